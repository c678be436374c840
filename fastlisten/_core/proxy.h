/* The header of the PROXY protocol, versions 1 and 2: HAProxy's doc/proxy-protocol.txt, called "the
 * specification" here.
 *
 * proxy_parse() looks at what has come so far.  It keeps nothing: with more bytes it is asked again from the
 * first on.  So what comes one byte at a time and what comes in one piece get one answer, and no answer but
 * PROXY_MORE changes when more comes.  It reads nothing past the length that it is given, makes no system
 * call and needs no Python.
 */
#ifndef FASTLISTEN_PROXY_H
#define FASTLISTEN_PROXY_H

#include <stdint.h>
#include <string.h>

/* A longer header is invalid.  The specification wants each to fit into one segment of 536 bytes; nginx takes
 * and sends as many as this. */
#define PROXY_MOST 4096
#define PROXY_MOST_V1 107                       /* section 2.1: the worst case, with CRLF */
#define PROXY_FIXED_V2 16                       /* section 2.2: up to the length, which counts the rest */
#define PROXY_UNIX_PATH 108
#define PROXY_MOST_UNIQUE_ID 128                /* section 2.2.5 */

enum proxy_answer {
    PROXY_MORE,                                 /* it is not whole yet */
    PROXY_DONE,
    PROXY_INVALID                               /* proxy_header.reason says why: abort the connection */
};

enum proxy_family {
    PROXY_UNKNOWN,                              /* the connection's own addresses are what counts */
    PROXY_INET,
    PROXY_INET6,
    PROXY_UNIX
};

enum proxy_tlv {
    PROXY_CRC32C = 0x03,
    PROXY_UNIQUE_ID = 0x05,
    PROXY_SSL = 0x20
};

typedef struct {
    int length;                                 /* of the header: what follows is the client's */
    int version;                                /* 1 or 2 */
    int local;                                  /* the proxy speaks for itself: a health check */
    int family;                                 /* of both addresses: enum proxy_family */
    int tlvs;                                   /* where they begin; as many bytes as `length`: there are none */
    unsigned char source[PROXY_UNIX_PATH];      /* 4, 16 or 108 bytes, in network order */
    unsigned char destination[PROXY_UNIX_PATH];
    uint16_t source_port, destination_port;     /* in host order */
    const char *reason;
} proxy_header;

static inline int proxy_invalid(proxy_header *header, const char *reason)
{
    header->reason = reason;
    return PROXY_INVALID;
}

/* --- Version 1: text --------------------------------------------------------------------------------------
 *
 * Each function reads from *at on, never from `end` on, and leaves *at behind what it has read.  Returned is
 * whether the grammar of section 2.1 has it so; then *at may be anywhere. */

static inline int proxy_text(const char **at, const char *end, const char *text)
{
    size_t length = strlen(text);
    if ((size_t)(end - *at) < length || memcmp(*at, text, length) != 0)
        return 0;
    *at += length;
    return 1;
}

/* A decimal number without leading zeros; -1 if there is none, or a greater one than `most`. */
static inline int proxy_number(const char **at, const char *end, int most)
{
    int value = 0;
    const char *first = *at;
    while (*at < end && **at >= '0' && **at <= '9') {
        if (*at > first && value == 0)
            return -1;
        value = value * 10 + (**at - '0');
        if (value > most)
            return -1;
        (*at)++;
    }
    return *at > first ? value : -1;
}

static inline int proxy_inet(const char **at, const char *end, unsigned char *to)
{
    int i, number;
    for (i = 0; i < 4; i++) {
        if (i > 0 && !proxy_text(at, end, "."))
            return 0;
        number = proxy_number(at, end, 255);
        if (number < 0)
            return 0;
        to[i] = (unsigned char)number;
    }
    return 1;
}

static inline int proxy_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

/* One to four hexadecimal digits; -1 if there is none.  A fifth is left for the next to stumble over. */
static inline int proxy_group(const char **at, const char *end)
{
    const char *first = *at;
    int value = 0;
    while (*at < end && *at < first + 4 && proxy_digit(**at) >= 0)
        value = value * 16 + proxy_digit(*(*at)++);
    return *at > first ? value : -1;
}

/* RFC 4291, section 2.2: groups, of which "::" stands for one or more of zeros.  The last 32 bits may be
 * written as an IPv4 address, as RFC 5952 has it for mapped ones (section 5) and inet_ntop(3) writes them;
 * the specification speaks of canonical format, and senders that listen on both families send that. */
static inline int proxy_inet6(const char **at, const char *end, unsigned char *to)
{
    int size = 0, gap = -1, group;
    const char *first;
    if (proxy_text(at, end, "::"))
        gap = 0;
    while (size < 16) {
        first = *at;
        group = proxy_group(at, end);
        if (group < 0) {
            if (gap != size)
                return 0;                       /* nothing, or something else, after a single colon */
            break;
        }
        if (*at < end && **at == '.') {
            *at = first;
            if (size > 12 || !proxy_inet(at, end, to + size))
                return 0;
            size += 4;
            break;
        }
        to[size++] = (unsigned char)(group >> 8);
        to[size++] = (unsigned char)(group & 255);
        if (gap < 0 && proxy_text(at, end, "::"))
            gap = size;
        else if (size == 16 || !proxy_text(at, end, ":"))
            break;
    }
    if (gap < 0)
        return size == 16;
    if (size > 14)
        return 0;
    memmove(to + 16 - (size - gap), to + gap, (size_t)(size - gap));
    memset(to + gap, 0, (size_t)(16 - size));
    return 1;
}

static inline int proxy_addresses(const char **at, const char *end, proxy_header *header)
{
    int source, destination;
    if (header->family == PROXY_INET) {
        if (!proxy_inet(at, end, header->source) || !proxy_text(at, end, " ") ||
            !proxy_inet(at, end, header->destination))
            return 0;
    } else if (!proxy_inet6(at, end, header->source) || !proxy_text(at, end, " ") ||
               !proxy_inet6(at, end, header->destination))
        return 0;
    if (!proxy_text(at, end, " "))
        return 0;
    source = proxy_number(at, end, 65535);
    if (source < 0 || !proxy_text(at, end, " "))
        return 0;
    destination = proxy_number(at, end, 65535);
    header->source_port = (uint16_t)source;
    header->destination_port = (uint16_t)destination;
    return destination >= 0;
}

static inline int proxy_parse_v1(const char *data, int length, proxy_header *header)
{
    int seen = length < PROXY_MOST_V1 ? length : PROXY_MOST_V1;
    int line = 0;
    const char *at = data, *end;
    while (line + 1 < seen && !(data[line] == '\r' && data[line + 1] == '\n'))
        line++;
    if (line + 1 >= seen)
        return seen < PROXY_MOST_V1 ? PROXY_MORE : proxy_invalid(header, "no CRLF in the first 107 bytes");
    end = data + line;
    header->version = 1;
    header->length = header->tlvs = line + 2;
    if (proxy_text(&at, end, "PROXY UNKNOWN") && (at == end || *at == ' '))
        return PROXY_DONE;                      /* whatever else the line says is to be ignored */
    at = data;
    if (proxy_text(&at, end, "PROXY TCP4 "))
        header->family = PROXY_INET;
    else if (proxy_text(&at, end, "PROXY TCP6 "))
        header->family = PROXY_INET6;
    else
        return proxy_invalid(header, "neither TCP4 nor TCP6 nor UNKNOWN");
    if (!proxy_addresses(&at, end, header) || at != end)
        return proxy_invalid(header, "addresses or ports that are none");
    return PROXY_DONE;
}

/* --- Version 2: bytes ------------------------------------------------------------------------------------- */

static inline int proxy_uint16(const char *data)
{
    return (unsigned char)data[0] << 8 | (unsigned char)data[1];
}

/* CRC32c as in RFC 9260, appendix A (RFC 4960's appendix B, which the specification names), of a header whose
 * checksum, at `field`, counts as zeros. */
static inline uint32_t proxy_crc32c(const char *data, int length, int field)
{
    uint32_t crc = 0xffffffff;
    int i, bit;
    for (i = 0; i < length; i++) {
        if (i < field || i >= field + 4)
            crc ^= (unsigned char)data[i];
        for (bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
    }
    return ~crc;
}

/* Whether the bytes from `at` to `end` are TLVs, each whole. */
static inline int proxy_tlvs_fit(const char *data, int at, int end)
{
    while (at < end) {
        if (end - at < 3)
            return 0;
        at += 3 + proxy_uint16(data + at + 1);
    }
    return at == end;
}

/* Why one of the TLVs, which fit, is invalid; NULL if none is.  Of an unknown type none is. */
static inline const char *proxy_tlvs_wrong(const char *data, const proxy_header *header)
{
    int at, size, sums = 0;
    const char *value;
    uint32_t sum;
    for (at = header->tlvs; at < header->length; at += 3 + size) {
        size = proxy_uint16(data + at + 1);
        value = data + at + 3;
        switch ((unsigned char)data[at]) {
        case PROXY_CRC32C:
            if (size != 4 || sums++)
                return "a checksum that is not one of 4 bytes";
            sum = (uint32_t)proxy_uint16(value) << 16 | (uint32_t)proxy_uint16(value + 2);
            if (sum != proxy_crc32c(data, header->length, at + 3))
                return "a wrong checksum";
            break;
        case PROXY_UNIQUE_ID:
            if (size > PROXY_MOST_UNIQUE_ID)
                return "a unique id of more than 128 bytes";
            break;
        case PROXY_SSL:
            if (size < 5 || !proxy_tlvs_fit(value, 5, size))
                return "TLVs of SSL that do not fit";
            break;
        }
    }
    return NULL;
}

/* How many bytes both addresses with their ports take: section 2.2. */
static inline int proxy_address_bytes(int family)
{
    switch (family) {
    case PROXY_INET:
        return 2 * 4 + 2 * 2;
    case PROXY_INET6:
        return 2 * 16 + 2 * 2;
    case PROXY_UNIX:
        return 2 * PROXY_UNIX_PATH;
    }
    return 0;
}

static inline void proxy_copy_addresses(const char *data, proxy_header *header)
{
    int size = header->family == PROXY_INET ? 4 : header->family == PROXY_INET6 ? 16 : PROXY_UNIX_PATH;
    data += PROXY_FIXED_V2;
    memcpy(header->source, data, (size_t)size);
    memcpy(header->destination, data + size, (size_t)size);
    if (header->family != PROXY_UNIX) {
        header->source_port = (uint16_t)proxy_uint16(data + 2 * size);
        header->destination_port = (uint16_t)proxy_uint16(data + 2 * size + 2);
    }
}

static inline int proxy_parse_v2(const char *data, int length, proxy_header *header)
{
    int command, family, transport;
    if (length < 13)
        return PROXY_MORE;
    command = data[12] & 15;
    if ((data[12] & 0xf0) != 0x20)
        return proxy_invalid(header, "a version that is not 2");
    if (command > 1)
        return proxy_invalid(header, "a command that is neither LOCAL nor PROXY");
    if (length < 14)
        return PROXY_MORE;
    family = command ? (unsigned char)data[13] >> 4 : PROXY_UNKNOWN;
    transport = command ? data[13] & 15 : 0;    /* LOCAL: "including the family which is ignored" */
    if (family > PROXY_UNIX || transport > 2)
        return proxy_invalid(header, "an unknown address family or transport protocol");
    if (length < PROXY_FIXED_V2)
        return PROXY_MORE;
    header->version = 2;
    header->length = PROXY_FIXED_V2 + proxy_uint16(data + 14);
    if (header->length > PROXY_MOST)
        return proxy_invalid(header, "more than 4096 bytes");
    if (header->length < PROXY_FIXED_V2 + proxy_address_bytes(family))
        return proxy_invalid(header, "a length that does not hold the addresses");
    if (length < header->length)
        return PROXY_MORE;
    header->local = !command;
    header->tlvs = header->length;
    if (!command)
        return PROXY_DONE;                      /* the whole block is to be discarded */
    header->tlvs = PROXY_FIXED_V2 + proxy_address_bytes(family);
    if (!proxy_tlvs_fit(data, header->tlvs, header->length)) {
        if (family != PROXY_UNKNOWN)
            return proxy_invalid(header, "TLVs that do not fit");
        header->tlvs = header->length;          /* UNSPEC may have addresses there, to be ignored */
    }
    header->reason = proxy_tlvs_wrong(data, header);
    if (header->reason != NULL)
        return PROXY_INVALID;
    /* Of a datagram, or of something unspecified, the addresses are of no use to a stream: "automatically falls
     * back to the UNSPEC mode". */
    header->family = transport == 1 ? family : PROXY_UNKNOWN;
    if (header->family != PROXY_UNKNOWN)
        proxy_copy_addresses(data, header);
    return PROXY_DONE;
}

/* --- Both --------------------------------------------------------------------------------------------------- */

/* Say what the first `length` bytes of a connection are: an enum proxy_answer.  The header is filled in with
 * PROXY_DONE; with PROXY_MORE its `length` is the whole header's, 0 while that is unknown. */
static inline int proxy_parse(const char *data, int length, proxy_header *header)
{
    static const char v1[] = "PROXY ", v2[] = "\r\n\r\n\0\r\nQUIT\n";
    int size1 = length < 6 ? length : 6, size2 = length < 12 ? length : 12;
    memset(header, 0, sizeof *header);
    if (memcmp(data, v1, (size_t)size1) == 0)
        return length < 6 ? PROXY_MORE : proxy_parse_v1(data, length, header);
    if (memcmp(data, v2, (size_t)size2) == 0)
        return proxy_parse_v2(data, length, header);
    return proxy_invalid(header, "no PROXY header");
}

#endif
