"""A client's way from the loop through the hooks of a socketserver."""

import _socket
import sys
import threading

cimport cython
from cpython.contextvars cimport PyContext_CopyCurrent, PyContext_Enter, PyContext_Exit, PyContext_New

from fastlisten._core.connection cimport ORIGIN, Connection, leave_table, origin_t
from fastlisten._core.port cimport *

cdef object _close = _socket.socket.close

# From Python 3.14 on a new thread's context can be a copy of that of who started it; before, it is empty.
cdef bint INHERITS_CONTEXT = getattr(sys.flags, "thread_inherit_context", 0)


cdef int shutdown_request(request) except -1:
    """TCPServer.shutdown_request() and close_request() of a socket.socket: end our side, and close."""
    cdef port_socket fd = request.fileno()
    if fd != PORT_NO_SOCKET:
        port_shutdown(fd, PORT_SHUT_WRITE)  # it may fail: the client may be gone
    # socket.close(): files of makefile() keep the descriptor until they are closed
    request._closed = True
    if request._io_refs <= 0:
        _close(request)
    return 0


@cython.final
cdef class CountedUntilHandled:
    """Calls `handler`, and has a client count for admission until that returns.

    A Connection counts until its descriptor is somebody else's: at once, where that is a socketserver's.
    """

    cdef object handler

    def __cinit__(self, handler):
        self.handler = handler

    def __call__(self, Connection connection not None):
        cdef origin_t counted
        cdef origin_t *origin
        counted.ticket = 0
        if connection.address_length == ORIGIN:
            origin = <origin_t *>connection.address.heap
            counted.table, counted.ticket = origin.table, origin.ticket
            origin.ticket = 0
        try:
            self.handler(connection)
        finally:
            leave_table(&counted)


@cython.final
cdef class RequestHooks:
    """What to do with a client: the hooks in the original's order, with its answers to their errors.

    server: whose hooks.  listener: stopped when a hook fails.  plain: whether a request's hooks are all the
    original's; then they are not called: this does what they do.
    """

    cdef object server, listener, failure
    cdef bint plain

    def __cinit__(self, server, listener, bint plain):
        self.server = server
        self.listener = listener
        self.plain = plain
        self.failure = None

    def in_line(self, Connection connection):
        """Handle a client in the thread of serve_forever()."""
        client_address = connection.peer
        self.request_in_line(connection.socket(), client_address)

    cpdef request_in_line(self, request, client_address):
        """The same for the client's socket."""
        try:
            if not self.plain and not self.server.verify_request(request, client_address):
                self.server.shutdown_request(request)
                return
            try:
                if self.plain:
                    self.server.RequestHandlerClass(request, client_address, self.server)
                    shutdown_request(request)
                else:
                    self.server.process_request(request, client_address)
            except Exception:
                self.server.handle_error(request, client_address)
                self.server.shutdown_request(request)
            except BaseException:
                self.server.shutdown_request(request)
                raise
        except Exception as error:  # of a hook: the original's serve_forever() raises it
            self.fail(error)

    def in_thread(self, Connection connection):
        """Handle a client in a thread of the loop, as if the thread had been started for it alone."""
        client_address = connection.peer
        self.request_in_thread(connection.socket(), client_address)

    cpdef request_in_thread(self, request, client_address):
        """The same for the client's socket."""
        context = PyContext_CopyCurrent() if INHERITS_CONTEXT else PyContext_New()
        PyContext_Enter(context)
        try:
            if self.plain:
                try:
                    self.server.RequestHandlerClass(request, client_address, self.server)
                except Exception:
                    self.server.handle_error(request, client_address)
                finally:
                    shutdown_request(request)
            else:
                self.server.process_request_thread(request, client_address)
        except BaseException:  # a thread's end, not the loop's; SystemExit is passed over in silence
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        finally:
            PyContext_Exit(context)

    cpdef fail(self, error):
        """End serve_forever(), which raises this."""
        if self.failure is None:
            self.failure = error
        self.listener.stop()

    def raise_failure(self):
        """Raise what a hook raised in the thread of serve_forever()."""
        failure, self.failure = self.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # else it keeps itself alive, and through its traceback the client's socket
