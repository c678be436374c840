cimport cython

from fastlisten._core.port cimport port_socket


cdef class Watched:
    cdef Hub hub
    cdef port_socket fd
    cdef short watched_for  # the events: POLLIN, POLLOUT, both or 0
    cdef bint polled        # by the hub's poller; else by the event loop, as all is where there is no poller

    cdef int ready(self, short events) except -1
    cdef int turn(self) except -1
    cdef int end(self) except -1
    cdef int send_written(self) except -1
    cdef int watch(self, short events) except -1
    cdef int ready_soon(self) except -1


@cython.final
cdef class Hub:
    cdef readonly object loop
    cdef public bint timed  # in debug mode: who takes long is told of by name
    cdef object transports  # the loop's table by descriptor, which nobody else may watch; None without one
    cdef object add_reader, remove_reader, add_writer, remove_writer  # the loop's
    cdef port_socket poller
    cdef bint registered    # the loop watches the poller
    cdef dict watched       # what the poller watches, by descriptor
    cdef object queue       # what call_soon() was given; None when the loop does not show it
    cdef Py_ssize_t guess   # what scheduled() says then, never the same twice
    cdef list due           # those that have a turn on the loop's next turn
    cdef list ending        # ... and those whose end() is what comes next
    cdef list writers       # those that have something to send at the end of the wake or the turn
    cdef bint awake         # a wake is under way, whose end sees to both

    cdef int watch(self, Watched what, short events) except -1
    cdef int poll_for(self, Watched what, short events) except -1
    cdef int have_loop_watch(self, Watched what, short events) except -1
    cdef int forget(self, Watched what) except -1
    cdef int give_poller_up(self, int code) except -1
    cdef int serve(self, Watched what, short events) except -1
    cdef int tell_of_long(self, Watched what, double seconds) except -1
    cdef int dispatch(self, Watched what, short events) except -1
    cdef int give_turns(self, list watched) except -1
    cdef int give_ends(self) except -1
    cdef int sleep(self) except -1

    cdef inline Py_ssize_t scheduled(self) except -1:
        """How many callbacks the loop has to call; a number never seen before when it does not tell."""
        if self.queue is None:
            self.guess += 1
            return self.guess
        return len(self.queue)

    cdef int turn_soon(self, Watched what) except -1
    cdef int end_soon(self, Watched what) except -1
    cdef int send_soon(self, Watched what) except -1
    cdef int send_all(self) except -1
    cdef int close(self) except -1
    cdef void close_poller(self) noexcept
