"""What admission.h offers, and a table of sources as an object."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from fastlisten._core.port cimport port_address, port_socket


cdef extern from "fastlisten/_core/admission.h" nogil:
    enum:
        ADMISSION_WAYS
        ADMISSION_WORST
        ADMISSION_REASONS
    int ADMISSION_UNIX, ADMISSION_INET, ADMISSION_INET6
    int ADMISSION_ADMITTED
    ctypedef struct admission_key:
        unsigned char bytes[17]
    ctypedef struct admission_range:
        pass
    ctypedef struct admission_list:
        const admission_range *ranges
        int count
    ctypedef struct admission_worst:
        admission_key source
        int64_t count
    ctypedef struct admission_head:
        uint64_t secret[2]
        int64_t admitted
        int64_t refused[5]
        int64_t sources, replaced, open, uncounted
        int64_t report_at
    ctypedef struct admission:
        int64_t holders, process, leases_most, interval, tolerance
        admission_head *head
        uint64_t buckets
        admission_list allow, deny, exempt
        int32_t concurrent
        int prefix4, prefix6
        bint dry_run
    int64_t admission_bytes(int64_t buckets, int64_t leases)
    void admission_place(admission *a, void *memory)
    void admission_set(admission_key *key, int kind, const void *address, int length)
    void admission_set6(admission_key *key, const unsigned char *address)
    void admission_set_user(admission_key *key, uint32_t user)
    void admission_peer(
        admission_key *key, port_socket s, int family, const port_address *address, int length)
    int admission_ask(
        admission *a, const admission_key *address, int64_t now, int64_t *ticket, bint *to_report)
    bint admission_leave(admission *a, int64_t ticket)
    void admission_penalise(admission *a, const admission_key *address, int64_t now, int64_t until)
    void admission_release(admission *a, const admission_key *address)
    void admission_ended(admission *a, int64_t process)
    bint admission_report(
        admission *a, int64_t now, int64_t next, bint rest, int64_t *since, int64_t *refused,
        admission_worst *worst)


cdef class Table:
    cdef admission *at
    cdef Py_buffer buffer
    cdef bytes allow, deny, exempt      # the ranges
    cdef object __weakref__

    cdef int keep(self, admission_list *list, bytes ranges) except -1
    cdef str text(self, const admission_key *source)
