/* What the fuzz targets beside it have in common: LLVMFuzzerTestOneInput() of each is called by libFuzzer, which
 * .ci/fuzz links it with, or by main(), without it:
 *
 * target SEED COUNT [FOLDER]: tries so many random examples, or writes them into the folder, for libFuzzer to begin
 * with.
 */
#ifndef FUZZ_H
#define FUZZ_H

#define _GNU_SOURCE                             /* as Python.h has it for port.h */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define LONGEST 700                             /* bytes of an example */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REQUIRE(condition) \
    ((condition) ? (void)0 : (fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), abort()))

#ifndef LIBFUZZER

/* Write a random example; return its length. */
static int example(char *data);

static uint64_t random_state;

static unsigned random_below(unsigned most)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)(random_state >> 33) % most;
}

static void write_example(const char *folder, long number, const char *data, int length)
{
    char path[4096];
    FILE *file;
    snprintf(path, sizeof path, "%s/example-%ld", folder, number);
    file = fopen(path, "wb");
    REQUIRE(file != NULL && fwrite(data, 1, (size_t)length, file) == (size_t)length && fclose(file) == 0);
}

int main(int count, char **arguments)
{
    char data[LONGEST] = {0};
    long i, number = count > 2 ? atol(arguments[2]) : 100000;
    random_state = 0x9e3779b97f4a7c15u ^ (uint64_t)(count > 1 ? atol(arguments[1]) : 1);
    for (i = 0; i < number; i++) {
        int length = example(data);
        if (count > 3)
            write_example(arguments[3], i, data, length);
        else
            LLVMFuzzerTestOneInput((const uint8_t *)data, (size_t)length);
    }
    printf("%ld inputs\n", number);
    return 0;
}

#endif
#endif
