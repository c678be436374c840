"""What probes.h offers."""

from libc.stdint cimport int64_t

from fastlisten._core.port cimport port_address, port_socket


cdef extern from "fastlisten/_core/probes.h" nogil:
    void probe_accept(port_socket listener, port_socket client)
    void probe_hand_over(port_socket client)
    void probe_refuse(port_socket client, int reason, const port_address *address)
    void probe_drop(port_socket client)
    void probe_drain_begin(port_socket listener, int64_t milliseconds)
    void probe_drain_end(port_socket listener)
