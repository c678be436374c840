/* Numbers that several threads count, sequentially consistent.  They may lie in memory that processes
 * share. */
#ifndef FASTLISTEN_ATOMIC_H
#define FASTLISTEN_ATOMIC_H

#include <stdint.h>

/* Add to the number; return what it is then. */
static inline int64_t port_add(volatile int64_t *number, int64_t by);

/* Return the number. */
static inline int64_t port_get(volatile int64_t *number);

/* Set the number; return what it was before. */
static inline int64_t port_swap(volatile int64_t *number, int64_t to);

/* Set the number if it is `from`; return whether it was (1) or not (0). */
static inline int port_replace(volatile int64_t *number, int64_t from, int64_t to);

#ifdef _MSC_VER

#include <intrin.h>

static inline int64_t port_add(volatile int64_t *number, int64_t by)
{
    return _InterlockedExchangeAdd64(number, by) + by;
}

static inline int64_t port_get(volatile int64_t *number)
{
    return _InterlockedExchangeAdd64(number, 0);
}

static inline int64_t port_swap(volatile int64_t *number, int64_t to)
{
    return _InterlockedExchange64(number, to);
}

static inline int port_replace(volatile int64_t *number, int64_t from, int64_t to)
{
    return _InterlockedCompareExchange64(number, to, from) == from;
}

#else  /* GCC and Clang */

static inline int64_t port_add(volatile int64_t *number, int64_t by)
{
    return __atomic_add_fetch(number, by, __ATOMIC_SEQ_CST);
}

static inline int64_t port_get(volatile int64_t *number)
{
    return __atomic_load_n(number, __ATOMIC_SEQ_CST);
}

static inline int64_t port_swap(volatile int64_t *number, int64_t to)
{
    return __atomic_exchange_n(number, to, __ATOMIC_SEQ_CST);
}

static inline int port_replace(volatile int64_t *number, int64_t from, int64_t to)
{
    return __atomic_compare_exchange_n(number, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

#endif
#endif
