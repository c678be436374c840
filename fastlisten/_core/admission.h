/* Who may come in: lists of networks, and a table of what each source has used up of its limits.
 *
 * The table has a fixed size and lies in memory that processes may share.  A source has one slot of 64 bytes
 * in a bucket of eight, which a keyed hash of its address names; where all eight are taken the one that is
 * least worth keeping goes.  So each question costs about the same, whoever asks.
 *
 * One lock guards all of it, held for a tenth of a microsecond.  A process may be killed while it has the
 * lock: a lock that stays with one holder for a second is taken from it, and what it may have left half done is
 * counted anew.  Every number read from the table is checked before it is an index, so that whatever another
 * process has written leads nowhere outside it.
 */
#ifndef FASTLISTEN_ADMISSION_H
#define FASTLISTEN_ADMISSION_H

#include <stdint.h>
#include <string.h>

#include "fastlisten/_core/atomic.h"
#include "fastlisten/_core/port.h"

#define ADMISSION_WAYS 8
#define ADMISSION_WORST 8                       /* sources that a report may name, counted among many */
#define ADMISSION_HEAD 1024                     /* bytes before the slots */
#define ADMISSION_SPINS 200
#define ADMISSION_LOCK_TIME 1000000000          /* ns; nobody who lives has the lock for so long */

/* The kinds of address, in the first byte of a key. */
enum { ADMISSION_NOBODY, ADMISSION_UNIX, ADMISSION_INET = 4, ADMISSION_INET6 = 6 };

/* What is answered; the reasons are in the order of REFUSALS, from "denied" on. */
enum admission_answer {
    ADMISSION_DENIED,
    ADMISSION_NOT_ALLOWED,
    ADMISSION_PENALISED,
    ADMISSION_CONCURRENT,
    ADMISSION_RATE,
    ADMISSION_REASONS,
    ADMISSION_ADMITTED = ADMISSION_REASONS
};

/* A kind and an address, from the left, with zeros after it: keys are in the order of the addresses.  A unix
 * peer's address is its user ID; all ones where that is not known. */
typedef struct {
    unsigned char bytes[17];
} admission_key;

typedef struct {
    admission_key first, last;
} admission_range;

typedef struct {
    const admission_range *ranges;              /* in order, and apart */
    int count;
} admission_list;

typedef struct {
    admission_key source;                       /* ADMISSION_NOBODY: the slot is free */
    unsigned char unused[3];
    uint32_t generation;                        /* another each time it gets a source */
    int64_t arrival;                            /* GCRA's theoretical arrival time: port_now() */
    int64_t penalised_until;                    /* port_now() */
    int64_t used;                               /* ... when it was asked for last */
    int32_t open;                               /* connections, with a lease each */
    unsigned char spare[12];
} admission_slot;

/* A connection that counts.  Whose it is says the process: when that ends, so do its leases. */
typedef struct {
    uint32_t slot;
    uint32_t generation;
    int32_t process;                            /* 0: the lease is free */
    uint32_t next;                              /* free one, and 1; 0: there is none */
} admission_lease;

typedef struct {
    admission_key source;
    unsigned char unused[7];
    int64_t count;
} admission_worst;

typedef struct {
    int64_t lock;                               /* 0, or the process and a number that changes */
    int64_t locked;                             /* how often */
    uint64_t secret[2];                         /* of the hash */
    uint32_t generation;
    uint32_t free;                              /* the first free lease, and 1; 0: there is none */
    int64_t begun;                              /* leases that were ever taken; those after them are free, too */
    int64_t penalties;                          /* somebody was ever penalised */
    int64_t admitted;
    int64_t refused[ADMISSION_REASONS];
    int64_t sources, replaced, open, uncounted;
    int64_t report_at;                          /* when the next may be: port_now(); 0: there was none yet */
    int64_t reported_at;
    int64_t to_report[ADMISSION_REASONS];       /* refused since the last report */
    admission_worst worst[ADMISSION_WORST];
} admission_head;

typedef struct {
    int64_t holders;                            /* of this struct: whoever serves with it, and each ticket */
    int64_t process;
    admission_head *head;
    admission_slot *slots;
    admission_lease *leases;
    uint64_t buckets;                           /* a power of two */
    int64_t leases_most;
    admission_list allow, deny, exempt;
    int32_t concurrent;                         /* 0: any number */
    int64_t interval, tolerance;                /* ns: of GCRA; an interval of 0: any rate */
    int prefix4, prefix6;
    int dry_run;
} admission;

typedef char admission_head_fits[sizeof(admission_head) <= ADMISSION_HEAD ? 1 : -1];
typedef char admission_slot_is_a_line[sizeof(admission_slot) == 64 ? 1 : -1];

/* How many bytes a table takes. */
static inline int64_t admission_bytes(int64_t buckets, int64_t leases)
{
    return ADMISSION_HEAD + buckets * ADMISSION_WAYS * (int64_t)sizeof(admission_slot)
         + leases * (int64_t)sizeof(admission_lease);
}

/* Have a table lie in this memory, which is all zeros or has the table of another process. */
static inline void admission_place(admission *a, void *memory)
{
    a->head = (admission_head *)memory;
    a->slots = (admission_slot *)((char *)memory + ADMISSION_HEAD);
    a->leases = (admission_lease *)(a->slots + a->buckets * ADMISSION_WAYS);
}

/* --- Addresses ------------------------------------------------------------------------------------------ */

static inline void admission_set(admission_key *key, int kind, const void *address, int length)
{
    memset(key, 0, sizeof *key);
    key->bytes[0] = (unsigned char)kind;
    memcpy(key->bytes + 1, address, (size_t)length);
}

/* An IPv6 address, or the IPv4 one that it stands for: RFC 4291, 2.5.5.2. */
static inline void admission_set6(admission_key *key, const unsigned char *address)
{
    if (memcmp(address, "\0\0\0\0\0\0\0\0\0\0\xff\xff", 12) == 0)
        admission_set(key, ADMISSION_INET, address + 12, 4);
    else
        admission_set(key, ADMISSION_INET6, address, 16);
}

static inline void admission_set_user(admission_key *key, uint32_t user)
{
    unsigned char bytes[4] = {
        (unsigned char)(user >> 24), (unsigned char)(user >> 16), (unsigned char)(user >> 8), (unsigned char)user};
    admission_set(key, ADMISSION_UNIX, bytes, 4);
}

/* The peer of an accepted connection; ADMISSION_NOBODY where the system has not told. */
static inline void admission_peer(
    admission_key *key, port_socket s, int family, const port_address *address, int length)
{
    memset(key, 0, sizeof *key);
    if (family == AF_UNIX)
        admission_set_user(key, port_peer_user(s));
    else if (length > 0 && family == AF_INET)
        admission_set(key, ADMISSION_INET, &address->in.sin_addr, 4);
    else if (length > 0 && family == AF_INET6)
        admission_set6(key, (const unsigned char *)&address->in6.sin6_addr);
}

/* Whose limits hold for an address: its prefix. */
static inline admission_key admission_source(const admission *a, const admission_key *address)
{
    admission_key source = *address;
    int bits = address->bytes[0] == ADMISSION_INET ? a->prefix4
             : address->bytes[0] == ADMISSION_INET6 ? a->prefix6 : 32;
    int whole = 1 + bits / 8;
    if (bits % 8)
        source.bytes[whole++] &= (unsigned char)(0xff << (8 - bits % 8));
    memset(source.bytes + whole, 0, sizeof source.bytes - (size_t)whole);
    return source;
}

static inline int admission_in(const admission_list *list, const admission_key *address)
{
    int low = 0, high = list->count;
    while (low < high) {                        /* the last range that begins at or before the address */
        int middle = low + (high - low) / 2;
        if (memcmp(&list->ranges[middle].first, address, sizeof *address) <= 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low > 0 && memcmp(address, &list->ranges[low - 1].last, sizeof *address) <= 0;
}

/* SipHash-1-3 of a key: who does not know the secret cannot choose addresses that share a bucket. */
static inline uint64_t admission_hash(const uint64_t secret[2], const admission_key *key)
{
    uint64_t v0 = secret[0] ^ UINT64_C(0x736f6d6570736575), v1 = secret[1] ^ UINT64_C(0x646f72616e646f6d);
    uint64_t v2 = secret[0] ^ UINT64_C(0x6c7967656e657261), v3 = secret[1] ^ UINT64_C(0x7465646279746573);
    uint64_t words[3] = {0, 0, (uint64_t)17 << 56};
    int i;
    memcpy(words, key->bytes + 1, 16);
    words[2] |= key->bytes[0];
#define ADMISSION_ROTATE(x, b) ((x) << (b) | (x) >> (64 - (b)))
#define ADMISSION_ROUND                                                                             \
    (v0 += v1, v1 = ADMISSION_ROTATE(v1, 13), v1 ^= v0, v0 = ADMISSION_ROTATE(v0, 32),              \
     v2 += v3, v3 = ADMISSION_ROTATE(v3, 16), v3 ^= v2, v0 += v3, v3 = ADMISSION_ROTATE(v3, 21),    \
     v3 ^= v0, v2 += v1, v1 = ADMISSION_ROTATE(v1, 17), v1 ^= v2, v2 = ADMISSION_ROTATE(v2, 32))
    for (i = 0; i < 3; i++) {
        v3 ^= words[i];
        ADMISSION_ROUND;
        v0 ^= words[i];
    }
    v2 ^= 0xff;
    for (i = 0; i < 3; i++)
        ADMISSION_ROUND;
#undef ADMISSION_ROUND
#undef ADMISSION_ROTATE
    return v0 ^ v1 ^ v2 ^ v3;
}

/* --- The lock ------------------------------------------------------------------------------------------- */

/* Count anew what is open, and which leases are free.  ended: a process whose leases end; 0: none. */
static inline void admission_recount(admission *a, int64_t ended)
{
    admission_head *head = a->head;
    uint64_t i;
    int64_t n, begun = head->begun < a->leases_most ? head->begun : a->leases_most;
    for (i = 0; i < a->buckets * ADMISSION_WAYS; i++)
        a->slots[i].open = 0;
    head->free = 0;
    head->open = 0;
    for (n = begun - 1; n >= 0; n--) {
        admission_lease *lease = &a->leases[n];
        if (lease->process == 0 || (ended != 0 && lease->process == ended)) {
            lease->process = 0;
            lease->next = head->free;
            head->free = (uint32_t)n + 1;
        } else {
            head->open++;
            if (lease->slot < a->buckets * ADMISSION_WAYS && a->slots[lease->slot].generation == lease->generation)
                a->slots[lease->slot].open++;
        }
    }
}

/* Return what admission_unlock() is to be given. */
static inline int64_t admission_lock(admission *a)
{
    admission_head *head = a->head;
    int64_t mine = a->process << 32 | (port_add(&head->locked, 1) & 0xffffffff);
    int64_t seen = 0, since = 0;
    int tries = 0;
    while (!port_replace(&head->lock, 0, mine)) {
        int64_t other = port_get(&head->lock);
        if (++tries < ADMISSION_SPINS || other == 0)
            continue;
        if (other != seen) {
            seen = other;
            since = port_now();
        } else if (port_now() - since > ADMISSION_LOCK_TIME && port_replace(&head->lock, other, mine)) {
            admission_recount(a, 0);
            break;
        }
        port_sleep(1);
    }
    return mine;
}

static inline void admission_unlock(admission *a, int64_t mine)
{
    port_replace(&a->head->lock, mine, 0);      /* else it was taken from us */
}

/* --- Slots ---------------------------------------------------------------------------------------------- */

static inline admission_slot *admission_bucket(const admission *a, const admission_key *source)
{
    return a->slots + (admission_hash(a->head->secret, source) & (a->buckets - 1)) * ADMISSION_WAYS;
}

/* The slot of a source; NULL: it has none. */
static inline admission_slot *admission_find(const admission *a, const admission_key *source)
{
    admission_slot *bucket = admission_bucket(a, source);
    int i;
    for (i = 0; i < ADMISSION_WAYS; i++)
        if (memcmp(&bucket[i].source, source, sizeof *source) == 0)
            return &bucket[i];
    return NULL;
}

/* How much is lost with a slot. */
static inline int admission_worth(const admission_slot *slot, int64_t now)
{
    if (slot->source.bytes[0] == ADMISSION_NOBODY)
        return 0;
    if (slot->open > 0 || slot->penalised_until > now)
        return 3;
    return slot->arrival > now ? 2 : 1;
}

/* The slot of a source, which gets one if it has none: a free one, or of those that are worth least the one
 * that was used last the longest time ago. */
static inline admission_slot *admission_take(admission *a, const admission_key *source, int64_t now)
{
    admission_slot *slot = admission_find(a, source);
    if (slot == NULL) {
        admission_slot *bucket = admission_bucket(a, source);
        int i, worth, least = 4;
        for (i = 0; i < ADMISSION_WAYS; i++) {
            worth = admission_worth(&bucket[i], now);
            if (worth < least || (worth == least && bucket[i].used < slot->used)) {
                slot = &bucket[i];
                least = worth;
            }
        }
        if (slot->source.bytes[0] == ADMISSION_NOBODY)
            port_add(&a->head->sources, 1);
        else
            port_add(&a->head->replaced, 1);
        memset(slot, 0, sizeof *slot);
        slot->generation = ++a->head->generation;
        slot->source = *source;
    }
    slot->used = now;
    return slot;
}

/* --- Leases --------------------------------------------------------------------------------------------- */

/* Count a connection of this source.  Return its ticket; 0 when there are more than can be counted. */
static inline int64_t admission_open(admission *a, admission_slot *slot)
{
    admission_head *head = a->head;
    admission_lease *lease;
    int64_t number = head->free;
    if (number > 0 && number <= a->leases_most) {
        lease = &a->leases[number - 1];
        head->free = lease->next;
    } else if (head->begun >= 0 && head->begun < a->leases_most) {
        number = ++head->begun;
        lease = &a->leases[number - 1];
    } else {
        head->uncounted++;
        return 0;
    }
    lease->slot = (uint32_t)(slot - a->slots);
    lease->generation = slot->generation;
    lease->process = (int32_t)a->process;
    slot->open++;
    port_add(&head->open, 1);
    port_add(&a->holders, 1);
    return number;
}

/* A connection with this ticket counts no more.  Return whether that was the last hold on `a`: free() it. */
static inline int admission_leave(admission *a, int64_t ticket)
{
    int64_t lock = admission_lock(a);
    admission_lease *lease = &a->leases[ticket - 1];
    if (lease->process == a->process) {         /* else this is a forked child, and the parent still has it */
        admission_slot *slot = &a->slots[lease->slot];
        if (lease->slot < a->buckets * ADMISSION_WAYS && slot->generation == lease->generation && slot->open > 0)
            slot->open--;
        lease->process = 0;
        lease->next = a->head->free;
        a->head->free = (uint32_t)ticket;
        port_add(&a->head->open, -1);
    }
    admission_unlock(a, lock);
    return port_add(&a->holders, -1) == 0;
}

/* A process has ended, with its connections. */
static inline void admission_ended(admission *a, int64_t process)
{
    int64_t n, begun = port_get(&a->head->begun), word = port_get(&a->head->lock);
    int counts = word >> 32 == process;
    if (counts)
        port_replace(&a->head->lock, word, 0);
    for (n = 0; n < begun && n < a->leases_most; n++)
        counts = counts || a->leases[n].process == process;
    if (counts) {
        word = admission_lock(a);
        admission_recount(a, process);
        admission_unlock(a, word);
    }
}

/* --- The question --------------------------------------------------------------------------------------- */

/* Count a refusal for the next report, and its source among the worst: an approximate count, as Metwally's
 * Space-Saving has it, which a source that sends much is sure to be in. */
static inline void admission_note(admission_head *head, const admission_key *source, int reason)
{
    admission_worst *least = &head->worst[0];
    int i;
    head->to_report[reason]++;
    for (i = 0; i < ADMISSION_WORST; i++) {
        admission_worst *worst = &head->worst[i];
        if (worst->count && memcmp(&worst->source, source, sizeof *source) == 0) {
            worst->count++;
            return;
        }
        if (worst->count < least->count)
            least = worst;
    }
    least->source = *source;
    least->count++;
}

/* What the limits say of a client of this source; it is counted when it is admitted. */
static inline int admission_limits(admission *a, const admission_key *source, int64_t now, int64_t *ticket)
{
    int limited = a->concurrent > 0 || a->interval > 0;
    admission_slot *slot = limited ? admission_take(a, source, now) : admission_find(a, source);
    if (slot == NULL)
        return ADMISSION_ADMITTED;
    if (slot->penalised_until > now)
        return ADMISSION_PENALISED;
    if (a->concurrent > 0 && slot->open >= a->concurrent)
        return ADMISSION_CONCURRENT;
    if (a->interval > 0) {                      /* ITU-T I.371, annex A: the virtual scheduling algorithm */
        int64_t arrival = slot->arrival > now ? slot->arrival : now;
        if (arrival - now > a->tolerance)
            return ADMISSION_RATE;
        slot->arrival = arrival + a->interval;
    }
    if (a->concurrent > 0)
        *ticket = admission_open(a, slot);
    return ADMISSION_ADMITTED;
}

/* Whether who comes from this address may come in: ADMISSION_ADMITTED, or a reason.
 *
 * ticket: what admission_leave() is to be given at the connection's end; 0: nothing.  to_report: set when a
 * report is due.  The first of these that holds is the answer: the address is denied; it is exempt; there is
 * a list of those allowed, and it is not in that; its source is penalised, has too many connections, or too
 * many in too short a time. */
static inline int admission_ask(
    admission *a, const admission_key *address, int64_t now, int64_t *ticket, int *to_report)
{
    admission_head *head = a->head;
    int answer = ADMISSION_ADMITTED, limited = 0;
    *ticket = 0;
    if (admission_in(&a->deny, address))
        answer = ADMISSION_DENIED;
    else if (admission_in(&a->exempt, address))
        ;
    else if (a->allow.count && !admission_in(&a->allow, address))
        answer = ADMISSION_NOT_ALLOWED;
    else if (address->bytes[0] != ADMISSION_NOBODY)
        limited = a->concurrent > 0 || a->interval > 0 || port_get(&head->penalties);
    if (limited || answer != ADMISSION_ADMITTED) {
        admission_key source = admission_source(a, address);
        int64_t lock = admission_lock(a);
        if (limited)
            answer = admission_limits(a, &source, now, ticket);
        if (answer != ADMISSION_ADMITTED) {
            admission_note(head, &source, answer);
            *to_report = *to_report || now >= head->report_at;
        }
        admission_unlock(a, lock);
    }
    port_add(answer == ADMISSION_ADMITTED ? &head->admitted : &head->refused[answer], 1);
    return answer;
}

/* --- What a handler asks for ---------------------------------------------------------------------------- */

static inline void admission_penalise(admission *a, const admission_key *address, int64_t now, int64_t until)
{
    admission_key source = admission_source(a, address);
    int64_t lock = admission_lock(a);
    admission_slot *slot = admission_take(a, &source, now);
    if (slot->penalised_until < until)
        slot->penalised_until = until;
    port_swap(&a->head->penalties, 1);
    admission_unlock(a, lock);
}

static inline void admission_release(admission *a, const admission_key *address)
{
    admission_key source = admission_source(a, address);
    int64_t lock = admission_lock(a);
    admission_slot *slot = admission_find(a, &source);
    if (slot != NULL)
        slot->penalised_until = 0;
    admission_unlock(a, lock);
}

/* Take out what is to be reported, and have the next report be at `next`.  Return 0 when there is nothing, or it
 * is not time, but for the rest at the end.  since: when the last one was; 0: there was none. */
static inline int admission_report(
    admission *a, int64_t now, int64_t next, int rest, int64_t *since, int64_t *refused, admission_worst *worst)
{
    admission_head *head = a->head;
    int i, some = 0;
    int64_t lock = admission_lock(a);
    for (i = 0; i < ADMISSION_REASONS; i++)
        some = some || head->to_report[i];
    if (some && (rest || now >= head->report_at)) {
        *since = head->reported_at;
        memcpy(refused, head->to_report, sizeof head->to_report);
        memcpy(worst, head->worst, sizeof head->worst);
        memset(head->to_report, 0, sizeof head->to_report);
        memset(head->worst, 0, sizeof head->worst);
        head->report_at = next;
        head->reported_at = now;
    } else {
        some = 0;
    }
    admission_unlock(a, lock);
    return some;
}

#endif
