/* USDT probes: points where gdb, bpftrace, perf and SystemTap can look at a process that runs.
 *
 * OPERATION.md, "Probes", says when each comes and what its arguments are.  One that nobody watches is a nop,
 * and a note in the file's section .note.stapsdt.  Without SystemTap's header at build time there is nothing.
 * sdt-config.h comes with that header alone: FreeBSD and macOS have a sys/sdt.h, too, which is another.
 * https://sourceware.org/systemtap/wiki/UserSpaceProbeImplementation
 */
#ifndef FASTLISTEN_PROBES_H
#define FASTLISTEN_PROBES_H

#include "port.h"

#ifdef __has_include
#  if __has_include(<sys/sdt-config.h>)
#    include <sys/sdt.h>
#    define PROBE1(name, a) STAP_PROBE1(fastlisten, name, a)
#    define PROBE2(name, a, b) STAP_PROBE2(fastlisten, name, a, b)
#    define PROBE3(name, a, b, c) STAP_PROBE3(fastlisten, name, a, b, c)
#  endif
#endif
#ifndef PROBE1
#  define PROBE1(name, a) ((void)(a))
#  define PROBE2(name, a, b) ((void)(a), (void)(b))
#  define PROBE3(name, a, b, c) ((void)(a), (void)(b), (void)(c))
#endif

static inline void probe_accept(port_socket listener, port_socket client)
{
    PROBE2(accept, listener, client);
}

static inline void probe_hand_over(port_socket client)
{
    PROBE1(hand_over, client);
}

static inline void probe_refuse(port_socket client, int reason, const port_address *address)
{
    PROBE3(refuse, client, reason, address);
}

static inline void probe_drop(port_socket client)
{
    PROBE1(drop, client);
}

static inline void probe_drain_begin(port_socket listener, int64_t milliseconds)
{
    PROBE2(drain_begin, listener, milliseconds);
}

static inline void probe_drain_end(port_socket listener)
{
    PROBE1(drain_end, listener);
}

#endif
