/* The port: what every system must provide, under one set of names.
 *
 * This file is the contract.  port_posix.h and port_windows.h implement it, and these three and setup.py
 * are the only places that ask which system this is.  To add a system is to write one more file that
 * defines all of what stands here; the compiler checks the functions, for they are declared below.
 *
 * Every call is one system call, or the few that make up one where a system has no single one.  What to do
 * about a failure is the caller's business: a call fails with a code that port_error() tells.  Nothing
 * blocks but port_poll() and calls on a blocking socket.  Nothing needs Python, but for the section at the
 * end.
 */
#ifndef FASTLISTEN_PORT_H
#define FASTLISTEN_PORT_H

/* --- Types and constants: to be defined --------------------------------------------------------------------
 *
 * port_socket         a socket's or a poller's descriptor, signed; -1 is "none", as in Python's socket module
 * port_pollfd         what port_poll() watches: fd (a port_socket), events and revents (short: POLLIN,
 *                     POLLOUT, ...)
 * port_address        a client's address as the kernel wrote it, a union: any (struct sockaddr), in, in6, ...
 *
 * PORT_REUSE_ADDRESS  1: bind() needs SO_REUSEADDR to take a port over from a server that has just ended, and
 *                     lets nobody in beside one that runs.  0: it does not need it, or others would get in
 * PORT_BALANCES       1: listeners that share a port by SO_REUSEPORT share its clients.  0: they do not, or there is
 *                     no such thing
 * PORT_SIGNALS_APART  1: Ctrl-C comes in a thread of its own and interrupts no system call.  0: signals
 *                     interrupt
 *
 * PORT_NO_SIGPIPE     for port_send(), or 0: to a client that has gone, do not end a program that has
 *                     SIGPIPE's default action, as send(2) says of MSG_NOSIGNAL
 * PORT_MORE           for port_send(), or 0: more follows at once, the end of the stream at least, so that
 *                     one segment takes both
 * PORT_SHUT_WRITE     for port_shutdown(): the direction in which we send
 * PORT_SHUT_BOTH      for port_shutdown(): both directions
 *
 * PORT_X              the code that a failed call leaves for the condition that POSIX calls X: EAGAIN,
 *                     EWOULDBLOCK, EINTR, ECONNABORTED, ECONNRESET, EPROTO, ENOPROTOOPT, ENETDOWN,
 *                     ENETUNREACH, EHOSTDOWN, EHOSTUNREACH, ENONET, EPERM, ETIMEDOUT, ENOSR, ESOCKTNOSUPPORT,
 *                     EPROTONOSUPPORT, ENOTCONN, EMFILE, ENFILE, ENOBUFS, ENOMEM, EBADF, EINVAL, ENOTSOCK, ECANCELED,
 *                     and Windows's ENETNAME_DELETED.  One that accept() never leaves on this system is
 *                     PORT_NEVER(n), so that the table of its failures need not ask which system this is
 * PORT_CLOSED         the code of a call on the socket -1
 * PORT_PEER_RESET     the code of a call on a connection that its peer has reset
 */
#define PORT_NO_SOCKET ((port_socket)-1)
#define PORT_NEVER(n) (-1000 - (n))             /* a value that no call ever leaves, one for each n */

#ifdef _WIN32
#  include "port_windows.h"
#else
#  include "port_posix.h"
#endif

#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include "atomic.h"

/* --- Errors --------------------------------------------------------------------------------------------- */

/* Return the code of this thread's last call that failed. */
static inline int port_error(void);

/* --- Descriptors ---------------------------------------------------------------------------------------- */

/* Close.  Return 0, or -1; the descriptor is gone either way and must not be closed again. */
static inline int port_close(port_socket s);

/* Make calls on the socket wait (`on` 0) or fail with EAGAIN instead (1).  Return 0, or -1. */
static inline int port_set_nonblocking(port_socket s, int on);

/* Return a descriptor that stands for nothing, to be closed when another is needed and there are none
 * left; PORT_NO_SOCKET if there is none left now. */
static inline port_socket port_spare(void);

/* Make two sockets, each connected to the other, non-blocking and never inherited by child processes, for
 * threads to wake each other: no signal handler runs inside.  Return 0 and have the caller close both, or
 * -1. */
static inline int port_pair(port_socket ends[2]);

/* Have room for `count` more descriptors before they are needed, where that saves time.  `s` is any open
 * one.  A hint: nothing is returned, and nothing is left open. */
static inline void port_make_room(port_socket s, int64_t count);

/* --- Accepting ------------------------------------------------------------------------------------------ */

/* Accept one client: never inherited by child processes, and blocking (`nonblocking` 0) or not (1),
 * whatever the listener is.  Both come from the accepting call itself where the system can; elsewhere a
 * fork in another thread can come between.  Return the socket, which the caller closes, and write the
 * address with its length in bytes (0: the system tells none).  Or return PORT_NO_SOCKET: no client was
 * taken, or it is closed. */
static inline port_socket port_accept(port_socket listener, port_address *address, int *length,
                                      int nonblocking);

/* Write the address of the other end of a connection, with its length in bytes.  Return 0, or -1. */
static inline int port_peer(port_socket s, port_address *address, int *length);

/* Return the user whose the process at the other end of a unix socket is; all ones where that is not told. */
static inline uint32_t port_peer_user(port_socket s);

/* Return the thread that calls, for port_interrupt(): a number above 1. */
static inline int64_t port_thread(void);

/* Have a thread that sleeps in port_accept() on this listener come back, with EINTR or ECANCELED.  Nothing is
 * returned: it may be about to sleep there, or may have come back already; but it has not ended. */
static inline void port_interrupt(port_socket listener, int64_t thread);

/* Return the path in a unix socket's address, `*size` bytes long (0: unnamed), not ended by a zero; it
 * lies in `address`.  NULL, with a size of 0, for any other family. */
static inline const char *port_unix_path(const port_address *address, int length, int *size);

/* Tell how many clients the kernel has queued for a TCP listener, and how many it would.  Return 0, or -1
 * where it does not tell. */
static inline int port_queue(port_socket listener, int *depth, int *limit);

/* --- Processes ------------------------------------------------------------------------------------------ */

/* Have the clients of a port go to `count` of the listeners that share it, at random: `targets` has their places in
 * the order in which they began to listen.  Clients from the port `probe` (0: none) go to place `probe_target`.
 * `member` is any of the listeners.  Return 0, or -1 where that is not to be had. */
static inline int port_steer(port_socket member, const int *targets, int count, int probe, int probe_target);

/* Have the system kill this process when the thread that forked it ends, in process `parent`.  Return 0; 1 when that
 * has ended already; or -1 where it is not to be had. */
static inline int port_end_with_parent(int64_t parent);

/* In a forked child: have a copy of its own of these whole pages, which it shares with its parent; they stay where
 * they are.  Return 0, or -1. */
static inline int port_unshare(void *pages, size_t length);

/* --- One connection's calls ----------------------------------------------------------------------------- */

/* Receive at most `length` bytes.  Return how many, 0 at the end of the stream, or -1. */
static inline ptrdiff_t port_recv(port_socket s, void *buffer, ptrdiff_t length, int flags);

/* The same for what has come already, which stays to be received; it fails with EAGAIN when nothing has. */
static inline ptrdiff_t port_peek(port_socket s, void *buffer, ptrdiff_t length);

/* Send at most `length` bytes.  Return how many, or -1. */
static inline ptrdiff_t port_send(port_socket s, const void *buffer, ptrdiff_t length, int flags);

/* End one direction, or both.  Return 0, or -1. */
static inline int port_shutdown(port_socket s, int how);

/* End both directions, so that a thread that is blocked in a call on the socket comes back.  Nothing is
 * returned: the client may be gone already, and no call may be under way. */
static inline void port_cut(port_socket s);

/* Return whether this is the code of a call on a socket that port_cut() has cut.  Always 0 where such a
 * call does not fail: POSIX's recv() returns 0 then, as if the client had sent all. */
static inline int port_says_cut(int code);

/* Have the coming close reset the connection and throw away what was not sent yet: SO_LINGER 0,
 * socket(7).  Return 0, or -1. */
static inline int port_abort_on_close(port_socket s);

/* Have no call on this socket raise SIGPIPE, where PORT_NO_SIGPIPE cannot say so a call: macOS.  Return 0,
 * also where there is nothing to do, or -1. */
static inline int port_no_sigpipe(port_socket s);

/* --- Waiting -------------------------------------------------------------------------------------------- */

/* Wait until one of n sockets is ready, at most so many milliseconds (< 0: without end).  Return how many
 * are ready (0: the time is over), with their revents set, or -1. */
static inline int port_poll(port_pollfd *polls, int n, int milliseconds);

/* Return a poller, which the caller closes: it watches any number of sockets, and is itself a descriptor
 * that another loop can watch.  PORT_NO_SOCKET where the system has none or it failed; port_error() tells
 * why only where the system has one. */
static inline port_socket port_poller(void);

/* Watch s for other events (POLLIN, POLLOUT; 0: not at all) than `before`.  Return 0, or -1. */
static inline int port_poller_set(port_socket poller, port_socket s, short before, short events);

/* Write which of the poller's sockets are ready now, at most n (and 64): fd and revents.  Return how many,
 * or -1; never waits. */
static inline int port_poller_ready(port_socket poller, port_pollfd *ready, int n);

/* Sleep for so many milliseconds. */
static inline void port_sleep(int milliseconds);

/* Return the time of a monotonic clock, in nanoseconds from an arbitrary start. */
static inline int64_t port_now(void);

/* --- What follows from the contract, on every system ---------------------------------------------------- */

/* Return whether this is the code of a call that would have to wait. */
static inline int port_would_block(int code)
{
    return code == PORT_EAGAIN || code == PORT_EWOULDBLOCK;
}

/* port_poll() with a time in nanoseconds (< 0: without end), rounded up to milliseconds. */
static inline int port_poll_ns(port_pollfd *polls, int n, int64_t ns)
{
    int64_t ms = ns < 0 ? -1 : (ns + 999999) / 1000000;
    return port_poll(polls, n, ms > INT_MAX ? INT_MAX : (int)ms);
}

/* --- Python: for those who have included Python.h ------------------------------------------------------- */

#ifdef Py_PYTHON_H

/* Whether Python code of several threads runs at the same time. */
#  ifdef Py_GIL_DISABLED
#    define PORT_PARALLEL 1
#  else
#    define PORT_PARALLEL 0
#  endif

/* Set the OSError (or the subclass) that CPython makes of the code, and return -1.  Needs the GIL. */
static inline int port_raise(int code)
{
#  ifdef _WIN32
    PyErr_SetExcFromWindowsErr(PyExc_OSError, code);
#  else
    errno = code;
    PyErr_SetFromErrno(PyExc_OSError);
#  endif
    return -1;
}

#endif
#endif
