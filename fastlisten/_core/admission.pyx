"""A table of what each source has used up of its limits, as an object; admission.h has what it does."""

import os

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.weakref cimport PyWeakref_NewRef
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from fastlisten._core.state import REFUSALS as _REFUSALS
from fastlisten._core.state import first_in_child

from fastlisten._core.port cimport *
from fastlisten._core.state cimport REFUSED_DENIED, log

# How often the log is told at most of who was refused.
cdef int64_t REPORT_EVERY = 60_000_000_000  # nanoseconds

# How many sources are named then.
cdef enum:
    NAMED = 3

REASONS = _REFUSALS[REFUSED_DENIED:REFUSED_DENIED + ADMISSION_REASONS]

WAYS = ADMISSION_WAYS


def bytes_for(int64_t buckets, int64_t leases):
    """How many bytes of memory a table takes."""
    return admission_bytes(buckets, leases)


_tables = set()  # a weak reference to each


@cython.final
cdef class Table:
    """Lists, limits, and the table in `memory`, which processes may share.

    memory: of bytes_for(buckets, leases) bytes, all zeros, or with the table of another process.  buckets: a
    power of two, each for WAYS sources.  leases: how many connections can be counted.  secret: 16 bytes; b""
    with the table of another.  allow, deny, exempt: ranges of keys, in order and apart: the first and the
    last.  concurrent: 0 for any number.  interval, tolerance: ns, of GCRA; an interval of 0: any rate.
    """

    def __cinit__(self, memory, int64_t buckets, int64_t leases, bytes secret not None, bytes allow not None,
                  bytes deny not None, bytes exempt not None, int concurrent, int64_t interval,
                  int64_t tolerance, int prefix4, int prefix6, bint dry_run):
        self.at = <admission *>calloc(1, sizeof(admission))
        if self.at is NULL:
            raise MemoryError
        self.at.holders = 1
        self.at.process = os.getpid()
        self.at.buckets, self.at.leases_most = buckets, leases
        self.keep(&self.at.allow, allow)
        self.keep(&self.at.deny, deny)
        self.keep(&self.at.exempt, exempt)
        self.allow, self.deny, self.exempt = allow, deny, exempt
        self.at.concurrent = concurrent
        self.at.interval, self.at.tolerance = interval, tolerance
        self.at.prefix4, self.at.prefix6 = prefix4, prefix6
        self.at.dry_run = dry_run
        PyObject_GetBuffer(memory, &self.buffer, PyBUF_WRITABLE)
        if self.buffer.len < admission_bytes(buckets, leases):
            raise ValueError(f"{self.buffer.len} bytes are too few for the table")
        admission_place(self.at, self.buffer.buf)
        if len(secret) >= <Py_ssize_t>sizeof(self.at.head.secret):
            memcpy(self.at.head.secret, <const char *>secret, sizeof(self.at.head.secret))
        _tables.add(PyWeakref_NewRef(self, _tables.discard))

    def __dealloc__(self):
        if self.at is not NULL and port_add(&self.at.holders, -1) == 0:
            free(self.at)
            if self.buffer.buf is not NULL:
                PyBuffer_Release(&self.buffer)
        # else connections are open that count in it: the last one frees `at`, and the memory stays mapped

    cdef int keep(self, admission_list *list, bytes ranges) except -1:
        list.ranges = <const admission_range *><const char *>ranges
        list.count = <int>(len(ranges) // sizeof(admission_range))
        return 0

    def ask(self, bytes address not None, int64_t now):
        """Whether who comes from this address may come in: (None, or one of REASONS; a ticket).

        address: a key.  now: port_now(), in ns.  The ticket is for leave(); 0: there is none.
        """
        cdef admission_key key = key_of(address)
        cdef int64_t ticket
        cdef bint due = False
        cdef int answer = admission_ask(self.at, &key, now, &ticket, &due)
        return None if answer == ADMISSION_ADMITTED else REASONS[answer], ticket

    def leave(self, int64_t ticket):
        """A connection with this ticket has ended."""
        if ticket:
            admission_leave(self.at, ticket)  # it is not the last hold: ours is another

    def penalise(self, bytes address not None, int64_t now, int64_t until):
        """Admit nobody of this address's source until then, in ns of port_now()."""
        cdef admission_key key = key_of(address)
        admission_penalise(self.at, &key, now, until)

    def release(self, bytes address not None):
        """End the penalty of this address's source."""
        cdef admission_key key = key_of(address)
        admission_release(self.at, &key)

    def counts(self):
        """The counters, by name."""
        cdef admission_head *head = self.at.head
        refused = {REASONS[i]: port_get(&head.refused[i]) for i in range(ADMISSION_REASONS)}
        return {
            "admitted": port_get(&head.admitted),
            "refused": {reason: count for reason, count in refused.items() if count},
            "open": port_get(&head.open),
            "sources": port_get(&head.sources),
            "replaced": port_get(&head.replaced),
        }

    def move(self, memory):
        """Lie in other memory, of as many bytes.  Raises RuntimeError when somebody serves with it."""
        cdef Py_buffer buffer
        if port_get(&self.at.holders) != 1:
            raise RuntimeError("this process serves with the Admission that is to go to another")
        PyObject_GetBuffer(memory, &buffer, PyBUF_WRITABLE)
        memcpy(buffer.buf, self.buffer.buf, admission_bytes(self.at.buckets, self.at.leases_most))
        admission_place(self.at, buffer.buf)
        PyBuffer_Release(&self.buffer)
        self.buffer = buffer

    def tell(self, bint rest=False):
        """Log who was refused since the last time, if it is time; the rest when somebody serves no more."""
        cdef int64_t refused[ADMISSION_REASONS]
        cdef admission_worst worst[ADMISSION_WORST]
        cdef int64_t now = port_now()
        cdef int64_t since
        if not admission_report(self.at, now, now + REPORT_EVERY, rest, &since, refused, worst):
            return
        reasons = {REASONS[i]: refused[i] for i in range(ADMISSION_REASONS) if refused[i]}
        found = [(worst[i].count, self.text(&worst[i].source)) for i in range(ADMISSION_WORST)
                 if worst[i].count]
        sources = {source: count for count, source in sorted(found, reverse=True)[:NAMED]}
        seconds = (now - since) / 1e9 if since else None
        event = "would have refused" if self.at.dry_run else "refused"
        log().warning("%s%s: %s; most from %s", event, "" if seconds is None else f" in {seconds:.1f} s",
                      ", ".join([f"{reason} {count}" for reason, count in reasons.items()]),
                      ", ".join([f"{source} ({count})" for source, count in sources.items()]),
                      extra={"event": event, "seconds": seconds, "reasons": reasons, "sources": sources})

    cdef str text(self, const admission_key *source):
        """A source for the log."""
        cdef char text[64]
        cdef int kind = source.bytes[0]
        cdef int bits = self.at.prefix4 if kind == ADMISSION_INET else self.at.prefix6
        if kind == ADMISSION_INET or kind == ADMISSION_INET6:
            inet_ntop(AF_INET if kind == ADMISSION_INET else AF_INET6, source.bytes + 1, text, sizeof(text))
            whole = bits == (32 if kind == ADMISSION_INET else 128)
            return text.decode("ascii") if whole else f"{text.decode('ascii')}/{bits}"
        user = int.from_bytes(source.bytes[1:5], "big")
        return f"unix:{user}" if kind == ADMISSION_UNIX and user != 0xffffffff else "unknown addresses"


cdef admission_key key_of(bytes address) except *:
    cdef admission_key key
    if len(address) != sizeof(key.bytes):
        raise ValueError(f"{address!r} is no key")
    memcpy(key.bytes, <const char *>address, sizeof(key.bytes))
    return key


def now():
    """port_now(): ns since some time."""
    return port_now()


# --- Processes ----------------------------------------------------------------------------------------------

cdef list all_tables():
    found = [table() for table in list(_tables)]
    return [table for table in found if table is not None]


def process_ended(int64_t process):
    """A process that shares tables with this one has ended: its connections count no more."""
    cdef Table table
    for table in all_tables():
        admission_ended(table.at, process)


@first_in_child
def _in_child():
    """In a forked child: connections are its parent's, and count there until that closes them."""
    cdef Table table
    for table in all_tables():
        table.at.process = os.getpid()
