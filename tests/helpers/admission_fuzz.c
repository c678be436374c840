/* A stream of operations on the table of admission.h, by several processes.
 *
 * The input says how large the table is and what the limits are, then what is done.  After each operation the table
 * is checked against itself and against a model that forgets nobody: whom the table refuses the model refuses, and as
 * long as the table has forgotten nobody both answer alike.  Some operations write anything into the table, as
 * another process might: from then on only what a sanitizer sees counts.
 */
#include "fuzz.h"
#include "fastlisten/_core/admission.h"

enum { PROCESSES = 3, MOST_SOURCES = 64, MOST_LEASES = 31 };

typedef struct {
    const uint8_t *at, *end;
} stream;

typedef struct {
    admission_key key;
    int64_t arrival, penalised_until;
    int open;
} model_source;

typedef struct {
    int64_t number;                             /* 0: there is no such connection */
    int process;
    int source;                                 /* in the model */
} ticket;

typedef struct {
    admission sharers[PROCESSES];
    void *memory;
    size_t bytes;
    int garbled;                                /* another process has written anything */
    int64_t now;
    model_source sources[MOST_SOURCES];
    int known;
    ticket tickets[MOST_LEASES];
    int64_t asked, to_report, report_at, reported_at;
} world;

static unsigned take_byte(stream *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

static int64_t take_number(stream *in, int bytes)
{
    int64_t number = 0;
    while (bytes--)
        number = number << 8 | take_byte(in);
    return number;
}

/* A time of up to 2^59 ns, of any size. */
static int64_t take_time(stream *in)
{
    int64_t number = take_number(in, 2);
    return number << take_byte(in) % 44;
}

/* --- Addresses and lists: each list of the table as the model has it is a plain search ---------------------- */

static admission_range lists[3][4];
static int lists_made;

static admission_range range(int kind, const char *first, const char *last, int length)
{
    admission_range found;
    admission_set(&found.first, kind, first, length);
    memset(&found.last, 0xff, sizeof found.last);
    found.last.bytes[0] = (unsigned char)kind;
    memcpy(found.last.bytes + 1, last, (size_t)length);
    return found;
}

static void make_lists(void)
{
    lists[0][0] = range(ADMISSION_UNIX, "\0\0\0\7", "\0\0\0\7", 4);
    lists[0][1] = range(ADMISSION_INET, "\12\0\0\4", "\12\0\0\7", 4);
    lists[0][2] = range(ADMISSION_INET, "\12\0\0\100", "\12\0\0\100", 4);
    lists[0][3] = range(ADMISSION_INET6, "\40\1\15\270", "\40\1\15\270\0\1", 4);
    lists[1][0] = range(ADMISSION_INET, "\0\0\0\0", "\377\377\377\377", 4);
    lists[1][1] = range(ADMISSION_INET6, "\0\0\0\0", "\377\377\377\377", 4);
    lists[2][0] = range(ADMISSION_UNIX, "\0\0\0\0", "\377\377\377\377", 4);
    lists[2][1] = range(ADMISSION_INET, "\12\0\0\1", "\12\0\0\2", 4);
    lists_made = 1;
}

static void set_list(admission_list *list, const admission_range *ranges, int count)
{
    list->ranges = ranges;
    list->count = count;
}

static int listed(const admission_list *list, const admission_key *key)
{
    int i;
    for (i = 0; i < list->count; i++)
        if (memcmp(&list->ranges[i].first, key, sizeof *key) <= 0 && memcmp(key, &list->ranges[i].last, sizeof *key) <= 0)
            return 1;
    return 0;
}

static admission_key take_address(stream *in)
{
    admission_key key;
    unsigned char bytes[16] = {0};
    unsigned i, kind = take_byte(in) % 6;
    memset(&key, 0, sizeof key);
    switch (kind) {
    case 1:
        admission_set_user(&key, take_byte(in));
        break;
    case 2:
    case 3:
        bytes[0] = 10;
        bytes[3] = (unsigned char)take_byte(in);
        admission_set(&key, ADMISSION_INET, bytes, 4);
        break;
    case 4:
        memcpy(bytes, "\40\1\15\270", 4);
        bytes[5] = (unsigned char)(take_byte(in) % 4);
        bytes[7] = (unsigned char)take_byte(in);
        bytes[15] = bytes[7] & 3;
        admission_set6(&key, bytes);
        break;
    case 5:
        for (i = 0; i < 16; i++)
            bytes[i] = (unsigned char)take_byte(in);
        admission_set6(&key, bytes);
        break;
    }
    return key;
}

/* --- The table --------------------------------------------------------------------------------------------- */

static const int64_t INTERVALS[] = {0, 0, 1, 1000, 50000000, 1000000000, 1000000000000};

static void begin(world *w, stream *in)
{
    int i;
    admission *a = &w->sharers[0];
    memset(w, 0, sizeof *w);
    a->holders = 1;
    a->buckets = (uint64_t)1 << take_byte(in) % 3;
    a->leases_most = take_byte(in) % (MOST_LEASES + 1);
    a->concurrent = (int32_t)(take_byte(in) % 4);
    a->interval = INTERVALS[take_byte(in) % (sizeof INTERVALS / sizeof *INTERVALS)];
    a->tolerance = a->interval * (int64_t)(take_byte(in) % 6);
    a->prefix4 = 32 - (int)(take_byte(in) % 8 ? 0 : take_byte(in) % 33);
    a->prefix6 = 64 - (int)(take_byte(in) % 8 ? 0 : take_byte(in) % 129) + 64 * (int)(take_byte(in) % 2);
    if (a->prefix6 < 0)
        a->prefix6 = 0;
    set_list(&a->deny, lists[0], (int)(take_byte(in) % 8 ? 0 : take_byte(in) % 5));
    set_list(&a->allow, lists[1], (int)(take_byte(in) % 8 ? 0 : take_byte(in) % 3));
    set_list(&a->exempt, lists[2], (int)(take_byte(in) % 8 ? 0 : take_byte(in) % 3));
    w->bytes = (size_t)admission_bytes((int64_t)a->buckets, a->leases_most);
    w->memory = calloc(1, w->bytes);
    if (w->memory == NULL)
        abort();
    admission_place(a, w->memory);
    a->head->secret[0] = take_byte(in);
    w->now = take_time(in);
    for (i = 0; i < PROCESSES; i++) {
        w->sharers[i] = *a;
        w->sharers[i].process = 100 + i;
    }
}

static int count_tickets(const world *w)
{
    int i, count = 0;
    for (i = 0; i < MOST_LEASES; i++)
        count += w->tickets[i].number != 0;
    return count;
}

/* How many connections count in a slot. */
static int open_in(const world *w, const admission_slot *slot)
{
    const admission *a = &w->sharers[0];
    int i, count = 0;
    for (i = 0; i < MOST_LEASES; i++) {
        const admission_lease *lease = &a->leases[w->tickets[i].number - 1];
        if (w->tickets[i].number != 0)
            count += a->slots + lease->slot == slot && lease->generation == slot->generation;
    }
    return count;
}

static void check_slots(const world *w)
{
    const admission *a = &w->sharers[0];
    uint64_t i;
    int64_t sources = 0;
    for (i = 0; i < a->buckets * ADMISSION_WAYS; i++) {
        const admission_slot *slot = &a->slots[i];
        if (slot->source.bytes[0] == ADMISSION_NOBODY)
            continue;
        sources++;
        REQUIRE(admission_find(a, &slot->source) == slot);   /* in its bucket, and once */
        REQUIRE(slot->open == open_in(w, slot));
        REQUIRE(a->concurrent == 0 || slot->open <= a->concurrent);
    }
    REQUIRE(a->head->sources == sources);
}

static void check_leases(const world *w)
{
    const admission *a = &w->sharers[0];
    int i;
    int64_t number, free_ones = 0, open = count_tickets(w);
    for (i = 0; i < MOST_LEASES; i++)
        if (w->tickets[i].number != 0)
            REQUIRE(a->leases[w->tickets[i].number - 1].process == w->sharers[w->tickets[i].process].process);
    REQUIRE(a->head->begun <= a->leases_most);
    for (number = a->head->free; number != 0; number = a->leases[number - 1].next) {
        REQUIRE(number <= a->head->begun && a->leases[number - 1].process == 0);
        REQUIRE(++free_ones <= a->head->begun);              /* else it is a circle */
    }
    REQUIRE(a->head->begun == open + free_ones);
    REQUIRE(a->head->open == open);
}

static void check(const world *w)
{
    const admission_head *head = w->sharers[0].head;
    int64_t total = head->admitted, noted = 0, worst = 0;
    int i;
    if (w->garbled)
        return;
    for (i = 0; i < ADMISSION_REASONS; i++) {
        total += head->refused[i];
        noted += head->to_report[i];
    }
    for (i = 0; i < ADMISSION_WORST; i++)
        worst += head->worst[i].count;
    REQUIRE(head->lock == 0);
    REQUIRE(total == w->asked);
    REQUIRE(noted == w->to_report && worst == w->to_report);
    check_slots(w);
    check_leases(w);
}

/* --- The model --------------------------------------------------------------------------------------------- */

/* The number of an address's source; -1: there are too many. */
static int source_of(world *w, const admission_key *address)
{
    admission_key key = admission_source(&w->sharers[0], address);
    int i;
    for (i = 0; i < w->known; i++)
        if (memcmp(&w->sources[i].key, &key, sizeof key) == 0)
            return i;
    if (w->known == MOST_SOURCES)
        return -1;
    w->sources[w->known].key = key;
    return w->known++;
}

static int expected(const world *w, const admission_key *address, const model_source *source)
{
    const admission *a = &w->sharers[0];
    if (listed(&a->deny, address))
        return ADMISSION_DENIED;
    if (listed(&a->exempt, address))
        return ADMISSION_ADMITTED;
    if (a->allow.count && !listed(&a->allow, address))
        return ADMISSION_NOT_ALLOWED;
    if (address->bytes[0] == ADMISSION_NOBODY)
        return ADMISSION_ADMITTED;
    if (source->penalised_until > w->now)
        return ADMISSION_PENALISED;
    if (a->concurrent && source->open >= a->concurrent)
        return ADMISSION_CONCURRENT;
    if (a->interval && source->arrival > w->now + a->tolerance)
        return ADMISSION_RATE;
    return ADMISSION_ADMITTED;
}

static void note_admitted(world *w, int process, int source, int64_t number)
{
    model_source *of = &w->sources[source];
    int i;
    if (w->sharers[0].interval > 0)
        of->arrival = (of->arrival > w->now ? of->arrival : w->now) + w->sharers[0].interval;
    for (i = 0; number != 0 && i < MOST_LEASES; i++)
        if (w->tickets[i].number == 0) {
            w->tickets[i].number = number;
            w->tickets[i].process = process;
            w->tickets[i].source = source;
            of->open++;
            return;
        }
}

/* --- Operations -------------------------------------------------------------------------------------------- */

static void ask(world *w, stream *in)
{
    int process = (int)(take_byte(in) % PROCESSES);
    admission *a = &w->sharers[process];
    admission_key address = take_address(in);
    int64_t number, replaced;
    int due = 0, answer, wanted, source = source_of(w, &address);
    if (source < 0)
        return;
    wanted = expected(w, &address, &w->sources[source]);
    answer = admission_ask(a, &address, w->now, &number, &due);
    replaced = a->head->replaced;
    w->asked++;
    REQUIRE(number >= 0 && number <= a->leases_most && (number == 0 || answer == ADMISSION_ADMITTED));
    if (!w->garbled) {
        REQUIRE(answer == wanted || (replaced > 0 && wanted < ADMISSION_REASONS && wanted > ADMISSION_NOT_ALLOWED));
        REQUIRE(due == (answer != ADMISSION_ADMITTED && w->now >= w->report_at));
    }
    if (answer != ADMISSION_ADMITTED)
        w->to_report++;
    else if (!listed(&a->exempt, &address) && address.bytes[0] != ADMISSION_NOBODY)
        note_admitted(w, process, source, number);
}

static void leave(world *w, stream *in)
{
    ticket *of = &w->tickets[take_byte(in) % MOST_LEASES];
    int process = of->process;
    if (of->number == 0)
        return;
    if (take_byte(in) % 8 == 0) {               /* a forked child closes its copy: its parent still has it */
        process = (process + 1) % PROCESSES;
        w->sharers[process].holders++;
        REQUIRE(!admission_leave(&w->sharers[process], of->number));
        return;
    }
    REQUIRE(!admission_leave(&w->sharers[process], of->number));
    w->sources[of->source].open--;
    of->number = 0;
}

static void penalise(world *w, stream *in)
{
    admission_key address = take_address(in);
    int64_t until = w->now + take_time(in);
    int source = source_of(w, &address);
    if (source < 0 || address.bytes[0] == ADMISSION_NOBODY)
        return;
    admission_penalise(&w->sharers[0], &address, w->now, until);
    if (w->sources[source].penalised_until < until)
        w->sources[source].penalised_until = until;
}

static void forgive(world *w, stream *in)
{
    admission_key address = take_address(in);
    int source = source_of(w, &address);
    if (source < 0)
        return;
    admission_release(&w->sharers[1], &address);
    w->sources[source].penalised_until = 0;
}

/* A process is killed, and may have had the lock, and been about to count. */
static void kill_one(world *w, stream *in)
{
    int i, process = (int)(take_byte(in) % PROCESSES);
    admission *a = &w->sharers[(process + 1) % PROCESSES];
    if (take_byte(in) % 2) {
        a->head->lock = (int64_t)w->sharers[process].process << 32 | take_byte(in);
        a->head->free = take_byte(in);
        a->head->open = take_byte(in);
        a->slots[take_byte(in) % (a->buckets * ADMISSION_WAYS)].open = (int32_t)take_byte(in);
    }
    admission_ended(a, w->sharers[process].process);
    w->sharers[process].holders = 1;
    for (i = 0; i < MOST_LEASES; i++)
        if (w->tickets[i].number != 0 && w->tickets[i].process == process) {
            w->sources[w->tickets[i].source].open--;
            w->tickets[i].number = 0;
        }
}

static void report(world *w, stream *in)
{
    int64_t since = 0, refused[ADMISSION_REASONS] = {0}, sum = 0, next = w->now + take_time(in);
    admission_worst worst[ADMISSION_WORST];
    int i, rest = take_byte(in) % 4 == 0;
    admission *a = &w->sharers[take_byte(in) % PROCESSES];
    int some = admission_report(a, w->now, next, rest, &since, refused, worst);
    if (w->garbled)
        return;
    REQUIRE(some == (w->to_report > 0 && (rest || w->now >= w->report_at)));
    if (!some)
        return;
    REQUIRE(since == w->reported_at);
    for (i = 0; i < ADMISSION_REASONS; i++)
        sum += refused[i];
    REQUIRE(sum == w->to_report);
    w->to_report = 0;
    w->report_at = next;
    w->reported_at = w->now;
}

/* All but the lock: for a holder that does not answer everybody waits a second. */
static void garble(world *w, stream *in)
{
    size_t at = (size_t)take_number(in, 2) % w->bytes;
    int64_t lock = w->sharers[0].head->lock;
    unsigned count = take_byte(in) % 17, value = take_byte(in);
    w->garbled = 1;
    for (; count > 0 && at < w->bytes; count--)
        ((unsigned char *)w->memory)[at++] = (unsigned char)(count % 2 ? value : take_byte(in));
    w->sharers[0].head->lock = lock;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    stream in = {data, data + size};
    world w;
    if (!lists_made)
        make_lists();
    begin(&w, &in);
    while (in.at < in.end) {
        unsigned what = take_byte(&in) % 32;
        if (what < 14)
            ask(&w, &in);
        else if (what < 22)
            leave(&w, &in);
        else if (what < 24)
            penalise(&w, &in);
        else if (what == 24)
            forgive(&w, &in);
        else if (what == 25)
            kill_one(&w, &in);
        else if (what == 26)
            report(&w, &in);
        else if (what < 31) {
            int64_t later = w.now + take_time(&in) - (int64_t)take_byte(&in);
            w.now = later < 0 || later > INT64_C(1) << 61 ? w.now : later;
        } else if (take_byte(&in) % 32 == 0)
            garble(&w, &in);
        check(&w);
    }
    free(w.memory);
    return 0;
}

#ifndef LIBFUZZER

static int example(char *data)
{
    int i, length = 20 + (int)random_below(LONGEST - 20);
    for (i = 0; i < length; i++)
        data[i] = (char)random_below(256);
    return length;
}

#endif
