"""Whose turn it is to accept: one thread leads at a time."""

cimport cython
from cpython.pythread cimport (
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_release_lock,
    PyThread_type_lock,
    WAIT_LOCK,
)
from libc.stdint cimport int64_t

from fastlisten._core.port cimport *

cdef extern from "pythread.h" nogil:
    enum PyLockStatus:
        PY_LOCK_ACQUIRED
    PyLockStatus PyThread_acquire_lock_timed(
        PyThread_type_lock lock, long long microseconds, int interruptible)

# How long a handler may keep the lead in its pocket before the heir takes it.  Shorter than anybody notices,
# and long beside the handlers that a high rate of connections needs; the heir's look costs 3 µs each time.
cdef long long TICK = 500  # microseconds

# A handler that took no longer than this was not worth waking another thread for.
cdef int64_t QUICK = 100_000  # nanoseconds

# After two handlers in a row that were not quick (one alone may have been preempted), clients are handed on
# at once: this many before the next try, and twice as many each time that finds a slow one again.
cdef enum:
    EAGER = 16
    EAGER_MOST = 1024

# The values of Lead.held; higher ones are in the pocket of a handler.
cdef enum:
    FREE = 0
    LEADING = 1

# The values of Lead.heir_waits.
cdef enum:
    FOR_ANYTHING = 1    # for the leader to take a client or to give up
    FOR_A_TICK = 2


@cython.final
cdef class Lead:
    """The right to accept, which one thread has at a time.

    A leader that has accepted a client keeps the lead in its pocket while it handles the client, and most
    often comes back before anybody missed it: no other thread was woken.  The first of the idle threads, the
    heir, looks after a TICK and takes the lead out of the pocket of a handler that is still busy; so nobody
    waits for long behind a slow one.  Where handlers are not quick, leaders hand the lead on at once.

    tick: microseconds instead of TICK; handlers count as quick when they take no longer than that.
    """

    def __cinit__(self, long long tick=0):
        self.tick, self.quick, self.eager_most = TICK, QUICK, EAGER_MOST
        if tick:
            self.tick, self.quick, self.eager_most = tick, 1000 * tick, EAGER
        self.clients = LEADING
        self.heir = PyThread_allocate_lock()
        self.alarm = PyThread_allocate_lock()
        if self.heir is NULL or self.alarm is NULL:
            raise MemoryError
        PyThread_acquire_lock(self.alarm, WAIT_LOCK)

    def __dealloc__(self):
        if self.heir is not NULL:
            PyThread_free_lock(self.heir)
        if self.alarm is not NULL:
            PyThread_free_lock(self.alarm)

    cdef bint take(self, long long patience) noexcept nogil:
        """Wait in line and lead; False when `patience` microseconds (< 0: no limit) were too few."""
        cdef int64_t held
        cdef int64_t seen = FREE
        cdef bint taken = False
        if PyThread_acquire_lock_timed(self.heir, patience, 0) != PY_LOCK_ACQUIRED:
            return False
        while not taken:
            held = port_get(&self.held)
            if held == seen or held == FREE:
                taken = port_replace(&self.held, held, LEADING)
            elif held == LEADING:
                seen = FREE
                if not self.wait(FOR_ANYTHING, patience):
                    break
            else:
                seen = held
                self.wait(FOR_A_TICK, self.tick)
        PyThread_release_lock(self.heir)
        return taken

    cdef bint wait(self, int64_t reason, long long patience) noexcept nogil:
        """The heir's sleep; False when nobody rang in that time."""
        cdef bint changed
        port_swap(&self.heir_waits, reason)
        changed = reason == FOR_ANYTHING and port_get(&self.held) != LEADING  # before we said that we wait
        if not changed and PyThread_acquire_lock_timed(self.alarm, patience, 0) == PY_LOCK_ACQUIRED:
            return True
        if port_swap(&self.heir_waits, 0) == 0:
            PyThread_acquire_lock(self.alarm, WAIT_LOCK)  # somebody rang just now
            return True
        return changed

    cdef int64_t pocket(self) noexcept nogil:
        """The leader goes to handle a client; returns what come_back() wants to see."""
        if PORT_PARALLEL:  # without the GIL even quick handlers gain from a second thread
            self.give_up()
            return FREE
        if self.eager > 0:
            self.eager -= 1
            self.give_up()
            return FREE
        self.clients += 1
        port_swap(&self.held, self.clients)
        if port_replace(&self.heir_waits, FOR_ANYTHING, 0):
            PyThread_release_lock(self.alarm)
        return self.clients

    cdef bint come_back(self, int64_t pocketed, int64_t since) noexcept nogil:
        """The handler that began at `since` has returned: whether its thread still leads."""
        cdef int64_t misses
        if pocketed == FREE:
            return False
        if port_now() - since <= self.quick:
            if self.misses:
                port_swap(&self.misses, 0)
        else:
            misses = port_add(&self.misses, 1)
            if misses > 1:
                port_swap(&self.eager, min(EAGER << min(misses - 2, 6), self.eager_most))
        return port_replace(&self.held, pocketed, LEADING)

    cdef void give_up(self) noexcept nogil:
        """Lead no more."""
        port_swap(&self.held, FREE)
        if port_swap(&self.heir_waits, 0) != 0:
            PyThread_release_lock(self.alarm)
