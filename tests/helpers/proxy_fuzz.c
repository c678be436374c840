/* Random bytes and damaged headers for proxy.h, to be built with the sanitizers.
 *
 * proxy_fuzz SEED COUNT: each input lies in memory of its very size, so that a byte read past its end is seen.
 * Checked is what proxy.h promises: the answers of its beginnings, one byte longer each time, are PROXY_MORE up to
 * one that stays.
 */
#include <stdio.h>
#include <stdlib.h>
#include "fastlisten/_core/proxy.h"

#define LONGEST 700

static uint64_t state;

static unsigned random_below(unsigned most)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (unsigned)(state >> 33) % most;
}

static int parse_beginning(const char *data, int length, proxy_header *header)
{
    char *exact = malloc(length ? (size_t)length : 1);
    int answer;
    if (exact == NULL)
        abort();
    memcpy(exact, data, (size_t)length);
    answer = proxy_parse(exact, length, header);
    free(exact);
    return answer;
}

static void check(const char *data, int length)
{
    proxy_header whole, part;
    int i, first = PROXY_MORE, last = parse_beginning(data, length, &whole);
    if (last == PROXY_DONE && (whole.length > length || whole.tlvs > whole.length || whole.length > PROXY_MOST))
        abort();
    for (i = 0; i <= length; i++) {
        int answer = parse_beginning(data, i, &part);
        if (first != PROXY_MORE && answer != first)
            abort();
        if (answer == PROXY_DONE && memcmp(&part, &whole, sizeof part) != 0)
            abort();
        if (answer == PROXY_INVALID && part.reason != whole.reason)
            abort();
        first = answer;
    }
    if (first != last)
        abort();
}

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
    int i, size, at = 16, end, count = (int)random_below(4);
    memcpy(to, "\r\n\r\n\0\r\nQUIT\n", 12);
    to[12] = (char)(0x20 | (random_below(8) != 0));
    to[13] = (char)families[random_below(sizeof families)];
    at += proxy_address_bytes((unsigned char)to[13] >> 4);
    for (i = 16; i < at; i++)
        to[i] = (char)random_below(256);
    while (count--) {
        to[at] = (char)types[random_below(sizeof types)];
        size = to[at] == 3 ? 4 : (int)random_below(40);
        to[at + 1] = 0;
        to[at + 2] = (char)size;
        for (i = 0; i < size; i++)
            to[at + 3 + i] = (char)(random_below(4) ? random_below(4) : random_below(256));
        at += 3 + size;
    }
    end = at - 16 + (random_below(16) ? 0 : (int)random_below(5) - 2);
    to[14] = (char)(end >> 8);
    to[15] = (char)end;
    return at + (int)random_below(4);
}

int main(int count, char **arguments)
{
    char data[LONGEST] = {0};
    long i, number = count > 2 ? atol(arguments[2]) : 100000;
    state = 0x9e3779b97f4a7c15u ^ (uint64_t)(count > 1 ? atol(arguments[1]) : 1);
    for (i = 0; i < number; i++) {
        int length, damages = (int)random_below(4);
        if (random_below(3) == 0) {
            const char *line = LINES[random_below(sizeof LINES / sizeof *LINES)];
            length = (int)strlen(line);
            memcpy(data, line, (size_t)length);
        } else
            length = binary(data);
        while (damages--) {
            static const char likely[] = " :.0f9\r\n";
            data[random_below((unsigned)length)] =
                random_below(2) ? likely[random_below(sizeof likely)] : (char)random_below(256);
        }
        check(data, random_below(4) ? length : (int)random_below((unsigned)length + 1));
    }
    printf("%ld inputs\n", number);
    return 0;
}
