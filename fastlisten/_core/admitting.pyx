"""Asks a table of sources about clients, and closes those that may not come in."""

cimport cython
from libc.stdint cimport int64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy

from fastlisten._core.accept cimport Shortage, client_t, drop, refuse, turn_away
from fastlisten._core.admission cimport (
    ADMISSION_ADMITTED,
    ADMISSION_INET,
    Table,
    admission_ask,
    admission_key,
    admission_leave,
    admission_peer,
    admission_set,
    admission_set6,
    admission_set_user,
)
from fastlisten._core.connection cimport ORIGIN, origin_t
from fastlisten._core.port cimport *
from fastlisten._core.proxy cimport PROXY_INET, PROXY_INET6, PROXY_UNIX, proxy_header
from fastlisten._core.state cimport REFUSED_DENIED


@cython.final
@cython.no_gc_clear  # __dealloc__ needs the table
cdef class Admitting:
    """Between accept and all else: who may come in.

    table: the lists and limits.  busy: what a refused client is told; b"" for a reset, None for nothing: it
    is closed.
    """

    def __cinit__(self, Table table not None, bytes busy=None):
        self.table = table
        port_add(&table.at.holders, 1)
        self.closes = busy is None
        self.busy = busy or b""
        self.text, self.length = self.busy, len(self.busy)

    def __dealloc__(self):
        port_add(&self.table.at.holders, -1)

    cdef int tells_with(self, Shortage shortage) except -1:
        """Have who was refused be told when this is."""
        self.shortage = shortage
        shortage.also = self.table
        return 0

    cdef bint admits(self, client_t *client) noexcept nogil:
        """Whether a client that was just accepted may come in; else it is closed."""
        cdef admission_key address
        cdef int64_t ticket
        cdef int answer
        cdef origin_t *origin
        admission_peer(&address, client.fd, client.state.family, &client.address, client.length)
        answer = self.ask(&address, &ticket)
        if answer != ADMISSION_ADMITTED:
            self.shut_out(client, answer)
            return False
        if ticket:
            origin = <origin_t *>malloc(sizeof(origin_t))
            if origin is NULL:
                admission_leave(self.table.at, ticket)  # not the last hold: ours is another
                drop(client)
                self.shortage.dropped(PORT_ENOMEM)
                return False
            origin.address, origin.length = client.address, client.length
            origin.size = 0
            origin.table, origin.ticket = self.table.at, ticket
            memcpy(&client.address, &origin, sizeof(origin))
            client.length = ORIGIN
        return True

    cdef int ask_for(self, const proxy_header *header, int64_t *ticket) noexcept nogil:
        """What ask() says of the client that a PROXY header names.

        A connection of the proxy's own may come in, and so may one of which the proxy says nothing.
        """
        cdef admission_key address
        if header.family == PROXY_INET:
            admission_set(&address, ADMISSION_INET, header.source, 4)
        elif header.family == PROXY_INET6:
            admission_set6(&address, header.source)
        elif header.family == PROXY_UNIX:
            admission_set_user(&address, 0xffffffff)
        else:
            ticket[0] = 0
            return ADMISSION_ADMITTED
        return self.ask(&address, ticket)

    cdef int ask(self, const admission_key *address, int64_t *ticket) noexcept nogil:
        """Whether somebody from this address may come in: ADMISSION_ADMITTED, or what shut_out() is to know.

        ticket: what is to leave at the connection's end; 0: nothing.
        """
        cdef bint due = False
        cdef int answer = admission_ask(self.table.at, address, port_now(), ticket, &due)
        if due:
            port_swap(&self.shortage.to_tell, 1)
        return ADMISSION_ADMITTED if self.table.at.dry_run else answer

    cdef void shut_out(self, client_t *client, int answer) noexcept nogil:
        """Close a client that may not come in."""
        if self.closes:
            turn_away(client, REFUSED_DENIED + answer)
        else:
            refuse(client, self.text, self.length, REFUSED_DENIED + answer)
