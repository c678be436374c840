"""What proxy.h offers: the parser of PROXY headers, without Python."""

from libc.stdint cimport uint16_t


cdef extern from "fastlisten/_core/proxy.h" nogil:
    enum:
        PROXY_MOST
    int PROXY_MORE, PROXY_DONE, PROXY_INVALID
    int PROXY_UNKNOWN, PROXY_INET, PROXY_INET6, PROXY_UNIX, PROXY_UNIX_PATH
    ctypedef struct proxy_header:
        int length
        int version
        bint local
        int family
        int tlvs
        const unsigned char *source
        const unsigned char *destination
        uint16_t source_port
        uint16_t destination_port
        const char *reason
    int proxy_parse(const char *data, int length, proxy_header *header)
