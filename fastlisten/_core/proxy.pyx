"""A PROXY header as Python's objects; what the bytes mean, proxy.h decides, without Python."""

from os import fsdecode

from cpython.bytes cimport PyBytes_FromStringAndSize

from fastlisten._core.proxy_header import ProxyHeader

from fastlisten._core.port cimport AF_INET, AF_INET6, inet_ntop


cdef object address(int family, const unsigned char *place, int port):
    """An address as the standard library has it; None for one of no family."""
    cdef char text[64]
    if family == PROXY_INET:
        inet_ntop(AF_INET, place, text, sizeof(text))
        return text.decode("ascii"), port
    if family == PROXY_INET6:
        inet_ntop(AF_INET6, place, text, sizeof(text))
        return text.decode("ascii"), port, 0, 0
    if family != PROXY_UNIX:
        return None
    # Filled up with zeros, which also end a path; an abstract name begins with one: unix(7).
    path = PyBytes_FromStringAndSize(<const char *>place, PROXY_UNIX_PATH)
    return path.rstrip(b"\0") if path[0] == 0 and path.strip(b"\0") else fsdecode(path.split(b"\0", 1)[0])


def parse(bytes data not None):
    """The ProxyHeader that a connection's first bytes are; None while it is not whole.

    Raises ValueError when it is none.
    """
    cdef proxy_header header
    cdef int at, size
    cdef const unsigned char *place = data
    cdef int answer = proxy_parse(<const char *>place, min(len(data), PROXY_MOST), &header)
    if answer == PROXY_INVALID:
        raise ValueError(header.reason.decode("ascii"))
    if answer != PROXY_DONE:
        return None
    tlvs = []
    at = header.tlvs
    while at < header.length:
        size = place[at + 1] << 8 | place[at + 2]
        tlvs.append((place[at], data[at + 3:at + 3 + size]))
        at += 3 + size
    return ProxyHeader(
        header.version,
        bool(header.local),
        address(header.family, header.source, header.source_port),
        address(header.family, header.destination, header.destination_port),
        tuple(tlvs),
        header.length,
    )
