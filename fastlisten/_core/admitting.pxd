from libc.stdint cimport int64_t

from fastlisten._core.accept cimport Shortage, client_t
from fastlisten._core.admission cimport Table, admission_key
from fastlisten._core.proxy cimport proxy_header


cdef class Admitting:
    cdef Table table
    cdef Shortage shortage          # with which the log is told
    cdef bint closes                # who is refused is told nothing
    cdef bytes busy                 # ... or this; b"": a reset
    cdef const char *text
    cdef Py_ssize_t length

    cdef int tells_with(self, Shortage shortage) except -1
    cdef bint admits(self, client_t *client) noexcept nogil
    cdef int ask_for(self, const proxy_header *header, int64_t *ticket) noexcept nogil
    cdef int ask(self, const admission_key *address, int64_t *ticket) noexcept nogil
    cdef void shut_out(self, client_t *client, int answer) noexcept nogil
