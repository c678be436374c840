/* Damaged PROXY headers for proxy.h.
 *
 * What lies behind an input is poisoned, so that AddressSanitizer sees a byte that is read past its end.  Checked is
 * what proxy.h promises: the answers of its beginnings, one byte longer each time, are PROXY_MORE up to one that
 * stays.  So no matter how a header comes in pieces, its answer is one.
 */
#include "fuzz.h"
#include <sanitizer/asan_interface.h>
#include "fastlisten/_core/proxy.h"

/* data: of `size` bytes, of which `length` have come. */
static int parse_beginning(const char *data, int size, int length, proxy_header *header)
{
    int answer;
    ASAN_POISON_MEMORY_REGION(data + length, (size_t)(size - length));
    answer = proxy_parse(data, length, header);
    ASAN_UNPOISON_MEMORY_REGION(data + length, (size_t)(size - length));
    return answer;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    proxy_header whole, part;
    int i, length = (int)size, first = PROXY_MORE, last;
    char *data = malloc(size + 1);              /* of ours: libFuzzer's may be anywhere in a larger one */
    REQUIRE(data != NULL);
    memcpy(data, input, size);
    last = parse_beginning(data, length + 1, length, &whole);
    REQUIRE(last != PROXY_DONE || (whole.length <= length && whole.tlvs <= whole.length));
    REQUIRE(last != PROXY_DONE || whole.length <= PROXY_MOST);
    for (i = 0; i <= length; i++) {
        int answer = parse_beginning(data, length + 1, i, &part);
        REQUIRE(first == PROXY_MORE || answer == first);
        REQUIRE(answer != PROXY_DONE || memcmp(&part, &whole, sizeof part) == 0);
        REQUIRE(answer != PROXY_MORE || last != PROXY_DONE || part.length == 0 || part.length == whole.length);
        REQUIRE(answer != PROXY_INVALID || part.reason == whole.reason);
        first = answer;
    }
    REQUIRE(first == last);
    free(data);
    return 0;
}

#ifndef LIBFUZZER

static const char *const LINES[] = {
    "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET / HTTP/1.1\r\n\r\n",
    "PROXY TCP6 2001:db8::1 ::ffff:1.2.3.4 65535 0\r\n",
    "PROXY TCP6 1:2:3:4:5:6:7:8 1::8 1 2\r\n",
    "PROXY UNKNOWN\r\nx",
    "PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n",
};

/* A header of version 2 with some TLVs that fit, mostly. */
static int binary(char *to)
{
    static const unsigned char families[] = {0x00, 0x11, 0x12, 0x21, 0x31, 0x10, 0x01, 0x41};
    static const unsigned char types[] = {1, 2, 3, 4, 5, 0x20, 0x30, 0xe0, 0xea, 0xff};
    int i, size, sum = 0, at = 16, end, count = (int)random_below(4);
    memcpy(to, "\r\n\r\n\0\r\nQUIT\n", 12);
    to[12] = (char)(0x20 | (random_below(8) != 0));
    to[13] = (char)families[random_below(sizeof families)];
    at += proxy_address_bytes((unsigned char)to[13] >> 4);
    for (i = 16; i < at; i++)
        to[i] = (char)random_below(256);
    while (count--) {
        to[at] = (char)types[random_below(sizeof types)];
        size = to[at] == 3 ? 4 : (int)random_below(to[at] == 5 ? 150 : 40);
        to[at + 1] = 0;
        to[at + 2] = (char)size;
        sum = to[at] == PROXY_CRC32C ? at + 3 : sum;
        for (i = 0; i < size; i++)
            to[at + 3 + i] = (char)(random_below(4) ? random_below(4) : random_below(256));
        at += 3 + size;
    }
    end = at - 16 + (random_below(16) ? 0 : (int)random_below(5) - 2);
    to[14] = (char)(end >> 8);
    to[15] = (char)end;
    if (sum > 0 && random_below(4)) {
        uint32_t right = proxy_crc32c(to, at, sum);
        for (i = 0; i < 4; i++)
            to[sum + i] = (char)(right >> (24 - 8 * i));
    }
    return at + (int)random_below(4);
}

static int example(char *data)
{
    static const char likely[] = " :.0f9\r\n";
    int length, damages = (int)random_below(4);
    if (random_below(3) == 0) {
        const char *line = LINES[random_below(sizeof LINES / sizeof *LINES)];
        length = (int)strlen(line);
        memcpy(data, line, (size_t)length);
    } else {
        length = binary(data);
    }
    while (damages--)
        data[random_below((unsigned)length)] =
            random_below(2) ? likely[random_below(sizeof likely)] : (char)random_below(256);
    return random_below(4) ? length : (int)random_below((unsigned)length + 1);
}

#endif
