// An explicit-state model of the takeover rules (docs/adr/0018-takeover.md): may a lost node's VMs start elsewhere while
// the node still runs them? Every state that the rules allow is visited, breadth first, so a violation that is found is a
// shortest one, and "safe" is a proof for this size.
//
// What is modelled. One victim `v` whose guests run as long as its watchdog has not reset it; N-1 peers that differ in
// nothing (so states are kept sorted by peer); Redis; one control worker that settles v's takeover. Time goes in ticks.
// - A message may be lost, be late without bound, or take effect while its answer is lost. Nobody is ever forced to act.
//   Together these cover each partition (one-way too), each outage of Redis, each pause of a process.
// - v's agent and each peer's may restart at any moment, any number of times.
// - Only two things are forced: time passes, and the watchdog resets v when it was not fed.
// - Bounds are closed: what a rule allows until x is still done at x. A wait that holds here must be longer in the world
//   than its bound (rule 8's inequalities are strict), or equal where the model counts the tick that ends it.
// - Ages saturate one past the last value that any rule tells apart, so there are finitely many states.
// - Once v is reset nothing can go wrong with it any more: such states are left out.
// The bad state: the takeover is committed, and v has not been reset yet.
//
// Usage: takeover N=3 T=3 W=1 S=1 L=0 M=2 A=4 [D=1] [Q=1] [switch...]; prints `safe STATES` (exit 0), or
// `violated STATES` and the way there (exit 1). Any word that is not known is an error (exit 2).
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr int kMaxPeers = 4;

// ------------------------------------------------------------------------------------------------- what is being run

// Sizes, in ticks. T: lease_ttl. W: watchdog_timeout. S: how long a poll may be used, from its start. L: from the
// watchdog's expiry to the last I/O. M, A: the margins of rule 7. D: ticks by which v's clocks may lag in all.
// Q: how long a master that lost its place still accepts writes.
std::map<std::string, int> size = {{"N", 3}, {"T", 3}, {"W", 1}, {"S", 1}, {"L", 0},
                                   {"M", 2}, {"A", 4}, {"D", 0}, {"Q", 0}};
int N, T, W, S, L, M, A, D, Q;

// Switches. The first group chooses what is modelled; the others break one rule each (mutants).
struct Switch {
  const char* name;
  bool on = false;
  operator bool() const { return on; }
};
Switch simple_peers{"simple-peers"};  // a peer's renewal is atomic or lost; its acknowledgements may still be late
Switch no_polls{"no-polls"};  // v never asks its peers (a lease that records failsafe=off, rule 11)
Switch switching{"switching"};  // v turns failsafe on and off, and records it in its lease (rules 3 and 11)
Switch failover{"failover"};  // Redis fails over once, and loses its last writes
Switch split{"split"};  // likewise, but the old master goes on serving v for up to Q

// Rule 7 replaced by looking at leases: more than half ...
Switch evidence_fresh{"evidence=fresh"};      // ... are fresh
Switch evidence_after{"evidence=after"};      // ... were renewed after v's expired
Switch evidence_lasting{"evidence=lasting"};  // ... have been fresh for A

// One rule each.
Switch open_feeds_at_start{"open-feeds-at-start"};        // rule 3: the device is opened, which feeds it, before an OK
Switch peer_forgets{"peer-forgets"};                      // rule 5: a restarted peer supports before it has had a reply
Switch peer_supports_suspect{"peer-supports-suspect"};    // rule 5: a peer that knows of the suspicion does not refuse
Switch poll_counted_from_end{"poll-counted-from-end"};    // rule 2
Switch ok_counted_from_answer{"ok-counted-from-answer"};  // rule 1: counted from the answer
Switch ok_before_applied{"ok-before-applied"};            // rule 4: an OK before its record has changed
Switch clock_steps{"clock-steps"};                        // rule 6: judged by a clock that may step forward
Switch grace_forgotten{"grace-forgotten"};                // rule 9: no wait after a failover
Switch acks_survive{"acks-survive"};                      // rule 9: a replica's acknowledgements are believed
Switch ids_reused{"ids-reused"};                          // rule 6: what acknowledges a former suspicion counts for a later
Switch old_master_for_ever{"old-master-for-ever"};        // rule 9: the old master never stops accepting v's writes
Switch half_is_enough{"half-is-enough"};                  // rules 2 and 7: half of the members, not more
Switch victim_votes{"victim-votes"};                      // rule 7: v's own vote is counted against it
Switch on_before_ok{"on-before-ok"};                      // rule 3: failsafe is used before Redis has recorded it
Switch renewals_unordered{"renewals-unordered"};          // rule 4: a late renewal replaces a newer one
Switch generations_unordered{"generations-unordered"};    // likewise, one of the agent's former life

std::vector<Switch*> switches = {
    &simple_peers, &no_polls, &switching, &failover, &split, &evidence_fresh, &evidence_after, &evidence_lasting,
    &open_feeds_at_start, &peer_forgets, &peer_supports_suspect, &poll_counted_from_end, &ok_counted_from_answer,
    &ok_before_applied, &clock_steps, &grace_forgotten, &acks_survive, &ids_reused, &old_master_for_ever,
    &half_is_enough, &victim_votes, &on_before_ok, &renewals_unordered, &generations_unordered};

enum class Evidence { Acknowledged, Fresh, After, Lasting };
Evidence evidence = Evidence::Acknowledged;
bool judges_freshness() { return evidence != Evidence::Acknowledged; }

// -------------------------------------------------------------------------------------------------------- the state

enum Request : uint8_t { kNone, kSent, kSentWithAck, kAnswered, kAnsweredSuspect };
enum Late : uint8_t { kNoLate, kLatePlain, kLateWithAck };

struct Peer {
  uint8_t knows;     // it was told that v is suspect, and holds to it
  uint8_t replied;   // it had a reply of Redis in this life of its agent
  uint8_t request;   // its renewal under way
  uint8_t late;      // a renewal that it gave up, and that may still take effect
  uint8_t acked;     // Redis holds its acknowledgement of the present suspicion
  uint8_t supports;  // its "no Redis, not refused" to v's present poll
  uint8_t lease;     // ticks since its renewal, where freshness is judged
  bool operator<(const Peer& other) const { return std::memcmp(this, &other, sizeof(Peer)) < 0; }
  bool operator==(const Peer& other) const { return std::memcmp(this, &other, sizeof(Peer)) == 0; }
};

struct State {
  // v's watchdog and agent
  uint8_t unfed;     // ticks since the last feed; v is reset, and its last I/O done, when these pass W + L
  uint8_t permit;    // ticks since the creation of the newest renewal that got its OK, up to T-W+1
  uint8_t failsafe;  // ticks since the start of the newest poll that found a majority, up to S+1
  uint8_t checked;   // it has read its clock and may feed, and has not yet written
  uint8_t request;   // its renewal: kNone, kSent, kAnswered
  uint8_t request_age;
  uint8_t late;      // a renewal that it gave up may still take effect
  uint8_t poll;      // ticks since the start of its present poll; S+1: none
  // With `switching`: whether v uses failsafe; what its renewal records; late ones that record "on" (`late`: "off"), and
  // "off" of a former life of its agent.
  uint8_t uses_failsafe, request_failsafe, late_on, late_former;
  // Redis and the control worker
  uint8_t unchanged;  // ticks since the worker first read v's lease as it is, up to T+M
  uint8_t suspect;
  uint8_t held;       // ticks since the worker first read all acknowledgements, up to A
  uint8_t lasting;    // likewise since a majority was fresh
  uint8_t recorded_failsafe;
  uint8_t stored;     // an answered renewal that is yet to be applied
  uint8_t lag;        // ticks by which v's clocks fell behind so far
  uint8_t failed_over, since_failover, split;  // split: ticks since the old master went on alone, plus 1
  uint8_t replica;    // acknowledgements that the replica has
  Peer peers[kMaxPeers];
};

int permit_over() { return T - W + 1; }
int lease_over() { return T + M; }
int grace_over() { return T + M + Q; }
bool is_majority(int count) { return half_is_enough ? 2 * count >= N : 2 * count > N; }

int acknowledged(const State& s) {
  int count = victim_votes ? 1 : 0;
  for (int i = 0; i < N - 1; i++) count += s.peers[i].acked;
  return count;
}
bool acknowledged_by_majority(const State& s) { return s.suspect && is_majority(acknowledged(s)); }

int fresh(const State& s) {
  int count = 0;
  for (int i = 0; i < N - 1; i++) {
    const int age = s.peers[i].lease;
    count += evidence == Evidence::After ? age + T < s.unchanged : evidence == Evidence::Lasting ? age <= 1 : age < T;
  }
  return count;
}

// Rule 7 (and rules 9, 11): would the takeover script commit now?
bool may_take_over(const State& s) {
  if (s.unchanged < lease_over()) return false;
  if (s.failed_over && !grace_forgotten && s.since_failover < grace_over()) return false;
  switch (evidence) {
    case Evidence::Acknowledged:
      if (no_polls || (switching && !s.recorded_failsafe)) return true;  // rule 11
      return acknowledged_by_majority(s) && s.held >= A;
    case Evidence::Lasting:
      return is_majority(fresh(s)) && s.lasting >= A;
    default:
      return is_majority(fresh(s));
  }
}

// ------------------------------------------------------------------------------------- states seen, 128 bits for each

struct Key {
  uint64_t high, low;
  bool operator==(const Key& other) const { return high == other.high && low == other.low; }
};

class Packer {
 public:
  template <typename Field>
  void field(Field& value, int bits) {
    if (unpacking_) {
      shift_ -= bits;
      value = static_cast<Field>((word_ >> shift_) & ((1u << bits) - 1));
    } else {
      if (value >= (1u << bits)) std::fprintf(stderr, "a field overflows %d bits\n", bits), std::exit(3);
      word_ = (word_ << bits) | value;
      shift_ += bits;
      if (shift_ > 128) std::fprintf(stderr, "a state needs more than 128 bits\n"), std::exit(3);
    }
  }
  static Key pack(State s) {
    for (int i = 1; i < N - 1; i++)  // insertion sort: there are at most four
      for (int j = i; j > 0 && s.peers[j] < s.peers[j - 1]; j--) std::swap(s.peers[j], s.peers[j - 1]);
    Packer packer;
    packer.all(s);
    return {static_cast<uint64_t>(packer.word_ >> 64), static_cast<uint64_t>(packer.word_)};
  }
  static State unpack(const Key& key, int used) {
    State s;
    std::memset(&s, 0, sizeof s);
    Packer packer;
    packer.word_ = (static_cast<unsigned __int128>(key.high) << 64) | key.low;
    packer.unpacking_ = true;
    packer.shift_ = used;
    packer.all(s);
    return s;
  }
  static int bits_used() {
    State s;
    std::memset(&s, 0, sizeof s);
    Packer packer;
    packer.all(s);
    return packer.shift_;
  }

 private:
  void all(State& s) {
    field(s.unfed, 4), field(s.permit, 4), field(s.failsafe, 3), field(s.checked, 1);
    field(s.request, 2), field(s.request_age, 4), field(s.late, 1), field(s.poll, 3);
    if (switching) {
      field(s.uses_failsafe, 1), field(s.request_failsafe, 1), field(s.late_on, 1);
      field(s.late_former, 1), field(s.recorded_failsafe, 1);
    }
    field(s.unchanged, 5), field(s.suspect, 1), field(s.held, 4), field(s.lag, 2);
    if (ok_before_applied) field(s.stored, 1);
    if (failover || split) {
      field(s.failed_over, 1), field(s.since_failover, 5), field(s.split, 4), field(s.replica, 3);
    }
    if (evidence == Evidence::Lasting) field(s.lasting, 4);
    for (int i = 0; i < N - 1; i++) {
      Peer& p = s.peers[i];
      field(p.knows, 1), field(p.replied, 1), field(p.request, 3), field(p.late, 2), field(p.acked, 1);
      field(p.supports, 1);
      if (judges_freshness()) field(p.lease, 4);
    }
  }
  unsigned __int128 word_ = 0;
  int shift_ = 0;
  bool unpacking_ = false;
};

class Search {
 public:
  Search() : table_(1 << 20, 0), mask_((1 << 20) - 1), bits_(Packer::bits_used()) {}

  void reach(const State& s, const char* how) {
    const Key key = Packer::pack(s);
    size_t at = hash(key) & mask_;
    for (; table_[at]; at = (at + 1) & mask_)
      if (keys_[table_[at] - 1] == key) return;
    keys_.push_back(key);
    from_.push_back(current_);
    how_.push_back(name_of(how));
    table_[at] = static_cast<uint32_t>(keys_.size());
    if (keys_.size() * 2 > table_.size()) grow();
  }
  State state(size_t number) const { return Packer::unpack(keys_[number], bits_); }
  size_t count() const { return keys_.size(); }
  void expanding(size_t number) { current_ = static_cast<uint32_t>(number); }

  void tell_way(size_t number) const {
    std::vector<size_t> way;
    for (size_t at = number; at; at = from_[at]) way.push_back(at);
    int tick = 0;
    for (auto at = way.rbegin(); at != way.rend(); ++at) {
      const std::string name = names_[how_[*at]];
      tick += name.rfind("a tick", 0) == 0;
      const State s = state(*at);
      std::printf("  t=%-2d %-58s unfed=%d permit=%d failsafe=%d unchanged=%d held=%d%s\n", tick, name.c_str(), s.unfed,
                  s.permit, s.failsafe, s.unchanged, s.held, s.checked ? " checked" : "");
    }
    std::printf("  t=%-2d control takes v over, and v still runs\n", tick);
  }

 private:
  static uint64_t hash(const Key& key) {
    uint64_t x = key.high * 0x9E3779B97F4A7C15ull ^ (key.low + 0x7F4A7C15ull) * 0xC2B2AE3D27D4EB4Full;
    x ^= x >> 29, x *= 0xBF58476D1CE4E5B9ull, x ^= x >> 32;
    return x;
  }
  void grow() {
    table_.assign(table_.size() * 2, 0);
    mask_ = table_.size() - 1;
    for (size_t i = 0; i < keys_.size(); i++) {
      size_t at = hash(keys_[i]) & mask_;
      while (table_[at]) at = (at + 1) & mask_;
      table_[at] = static_cast<uint32_t>(i + 1);
    }
  }
  uint16_t name_of(const char* name) {
    for (size_t i = 0; i < names_.size(); i++)
      if (names_[i] == name) return static_cast<uint16_t>(i);  // the same literal, so the same pointer
    names_.push_back(name);
    return static_cast<uint16_t>(names_.size() - 1);
  }
  std::vector<Key> keys_;
  std::vector<uint32_t> from_, table_;
  std::vector<uint16_t> how_;
  std::vector<const char*> names_;
  size_t mask_;
  int bits_;
  uint32_t current_ = 0;
};

Search* search;
// One step: a copy of the state, changed, is reached by it.
template <typename Change>
void step(const State& before, const char* how, Change change) {
  State after = before;
  change(after);
  search->reach(after, how);
}

// -------------------------------------------------------------------------------------------------- what may happen

void count_up(uint8_t& age, int over) {
  if (age < over) age++;
}

void end_poll(State& s) {
  s.poll = static_cast<uint8_t>(S + 1);
  for (int i = 0; i < N - 1; i++) s.peers[i].supports = 0;
}

// Rule 6: a renewal of v's ends the suspicion and its acknowledgements. What was sent for it counts for no later one,
// since ids are random.
void withdraw_suspicion(State& s) {
  s.suspect = 0;
  s.held = 0;
  for (int i = 0; i < N - 1; i++) {
    Peer& p = s.peers[i];
    p.acked = 0;
    p.knows = 0;
    if (ids_reused) continue;
    if (p.request == kSentWithAck) p.request = kSent;
    if (p.request == kAnsweredSuspect) p.request = kAnswered;
    if (p.late == kLateWithAck) p.late = judges_freshness() ? kLatePlain : kNoLate;
  }
}

void apply_renewal_of_v(State& s, bool failsafe) {
  s.unchanged = 0;
  s.recorded_failsafe = failsafe;
  withdraw_suspicion(s);
}

void forget_waits_that_ended(State& s) {
  if (!judges_freshness() && !acknowledged_by_majority(s)) s.held = 0;
  if (evidence == Evidence::Lasting && !is_majority(fresh(s))) s.lasting = 0;
}

void pass_time(const State& before, bool agent_lags, bool watchdog_lags, const char* how) {
  State s = before;
  if (!watchdog_lags) {
    if (s.unfed >= W + L) return;  // v is reset, and its last I/O is done
    s.unfed++;
  }
  if (!agent_lags) {
    count_up(s.permit, permit_over());
    count_up(s.failsafe, S + 1);
    if (s.request) count_up(s.request_age, permit_over());
    count_up(s.poll, S + 1);
  }
  if (agent_lags || watchdog_lags) s.lag++;
  count_up(s.unchanged, lease_over());
  if (s.failed_over) count_up(s.since_failover, grace_over());
  if (s.split) count_up(s.split, Q + 2);
  if (!judges_freshness() && acknowledged_by_majority(s)) count_up(s.held, A);
  if (judges_freshness())
    for (int i = 0; i < N - 1; i++) count_up(s.peers[i].lease, T);
  if (evidence == Evidence::Lasting) {
    if (is_majority(fresh(s))) count_up(s.lasting, A);
    else s.lasting = 0;
  }
  if (s.poll > S && !poll_counted_from_end) end_poll(s);  // its answers are of no use any more
  search->reach(s, how);
}

void time_passes(const State& s) {
  pass_time(s, false, false, "a tick");
  if (s.lag >= D) return;
  pass_time(s, true, false, "a tick, by which v's agent's clock lags");
  pass_time(s, false, true, "a tick, by which v's watchdog lags");
}

bool old_master_serves_v(const State& s) { return split && s.split; }

void give_up_renewal_of_v(State& s) {  // it may take effect later
  if (switching && s.request_failsafe) s.late_on = 1;
  else s.late = 1;
  s.request = kNone;
}

// Rules 1 and 4: v renews its lease.
void victim_renews(const State& s) {
  if (s.request == kNone) {
    step(s, "v creates and sends a renewal", [](State& t) {
      t.request = kSent, t.request_age = 0, t.request_failsafe = t.uses_failsafe;
    });
    if (switching && !s.uses_failsafe)
      step(s, "v sends a renewal that records failsafe on", [](State& t) {
        t.request = kSent, t.request_age = 0, t.request_failsafe = 1;
        if (on_before_ok) t.uses_failsafe = 1;
      });
  }
  if (s.request == kSent) {
    if (old_master_for_ever || !old_master_serves_v(s) || s.split < Q + 2)
      step(s, "Redis executes v's renewal", [](State& t) {
        t.request = kAnswered;
        if (ok_before_applied) t.stored = 1;
        else if (!old_master_serves_v(t)) apply_renewal_of_v(t, t.request_failsafe);
        // What v gave up before is older: it is refused from here on, by its sequence, or by its generation.
        if (switching && !renewals_unordered) t.late = t.late_on = 0;
        if (switching && !renewals_unordered && !generations_unordered) t.late_former = 0;
      });
    step(s, "v's renewal is lost", [](State& t) { t.request = kNone; });
    step(s, "v gives its renewal up; it is still under way", give_up_renewal_of_v);
  }
  if (s.stored) step(s, "the record of v's renewal is applied", [](State& t) {
    t.stored = 0, apply_renewal_of_v(t, t.request_failsafe);
  });
  if (s.request == kAnswered) {
    step(s, "v gets the OK of its renewal", [](State& t) {
      t.request = kNone;
      t.permit = ok_counted_from_answer ? 0 : std::min(t.permit, t.request_age);
      t.request_age = 0;
      t.uses_failsafe = t.uses_failsafe || t.request_failsafe;  // rule 3: on, now that Redis has it
    });
    step(s, "the OK to v is lost", [](State& t) { t.request = kNone; });
  }
  if (s.late) step(s, "Redis executes v's late renewal", [](State& t) {
    t.late = 0;
    if (!old_master_serves_v(t)) apply_renewal_of_v(t, false);
  });
  if (s.late_on) step(s, "Redis executes v's late renewal, which records failsafe on", [](State& t) {
    t.late_on = 0, apply_renewal_of_v(t, true);
  });
  if (s.late_former) step(s, "Redis executes a late renewal of v's agent's former life", [](State& t) {
    t.late_former = 0, apply_renewal_of_v(t, false);
  });
  if (switching && s.uses_failsafe)
    step(s, "v turns failsafe off", [](State& t) { t.uses_failsafe = 0, t.failsafe = S + 1, end_poll(t); });
}

// Rule 2: v polls its peers, and counts from the poll's start.
void victim_polls(const State& s) {
  if (no_polls || (switching && !s.uses_failsafe)) return;
  if (s.poll) step(s, "v begins a poll of its peers", [](State& t) { end_poll(t), t.poll = 0; });
  if (s.poll > S && !poll_counted_from_end) return;
  int with_v = 1;
  for (int i = 0; i < N - 1; i++) with_v += s.peers[i].supports;
  if (is_majority(with_v)) step(s, "v's poll: more than half have no Redis and don't refuse", [](State& t) {
    t.failsafe = poll_counted_from_end ? 0 : std::min(t.failsafe, t.poll);
    end_poll(t);
  });
}

// Rule 3: check, then feed; between the two v may be paused for as long as it likes.
void victim_feeds(const State& s) {
  if (s.unfed > W) return;  // the watchdog has fired
  if (!s.checked && (s.permit <= T - W || s.failsafe <= S))
    step(s, "v looks at its clock: it may feed", [](State& t) { t.checked = 1; });
  if (s.checked) step(s, "v feeds its watchdog", [](State& t) { t.checked = 0, t.unfed = 0; });
}

void victim_restarts(const State& s) {
  step(s, "v's agent restarts", [](State& t) {
    if (t.request == kSent) give_up_renewal_of_v(t);
    if (switching && t.late) t.late = 0, t.late_former = 1;
    t.checked = 0, t.permit = static_cast<uint8_t>(permit_over()), t.failsafe = static_cast<uint8_t>(S + 1);
    t.request = kNone, t.request_age = 0;
    t.uses_failsafe = 0;  // until a renewal of this life that records it has its OK
    end_poll(t);
    if (open_feeds_at_start && t.unfed <= W) t.unfed = 0;
  });
}

void peer_renews_simply(const State& s, int i) {
  const Peer& p = s.peers[i];
  if (!p.replied || p.knows != s.suspect || (judges_freshness() && p.lease))
    step(s, s.suspect ? "a peer renews, and hears that v is suspect" : "a peer renews", [i](State& t) {
      t.peers[i].replied = 1, t.peers[i].knows = t.suspect, t.peers[i].lease = 0;
      forget_waits_that_ended(t);
    });
  if (judges_freshness() && p.lease)
    step(s, "a peer's renewal is executed, its OK lost", [i](State& t) {
      t.peers[i].lease = 0, forget_waits_that_ended(t);
    });
  if (p.knows && !p.late && !p.acked)
    step(s, "a peer sends its acknowledgement", [i](State& t) { t.peers[i].late = kLateWithAck; });
  if (p.late) step(s, "a peer's acknowledgement is lost", [i](State& t) { t.peers[i].late = kNoLate; });
}

void peer_renews(const State& s, int i) {
  const Peer& p = s.peers[i];
  const bool under_way = p.request == kSent || p.request == kSentWithAck;
  if (p.request == kNone)  // rule 5: it carries the suspicion that it holds
    step(s, "a peer sends its renewal", [i](State& t) {
      t.peers[i].request = t.peers[i].knows ? kSentWithAck : kSent;
    });
  if (under_way) {
    step(s, "a peer's renewal is executed", [i](State& t) {
      Peer& q = t.peers[i];
      q.lease = 0;
      if (q.request == kSentWithAck && t.suspect) q.acked = 1;
      q.request = t.suspect ? kAnsweredSuspect : kAnswered;
      forget_waits_that_ended(t);
    });
    step(s, "a peer's renewal is lost", [i](State& t) { t.peers[i].request = kNone; });
    step(s, "a peer gives its renewal up; it is still under way", [i](State& t) {
      Peer& q = t.peers[i];
      const uint8_t left = q.request == kSentWithAck ? kLateWithAck : judges_freshness() ? kLatePlain : kNoLate;
      q.late = std::max(q.late, left), q.request = kNone;
    });
  }
  if (p.request >= kAnswered) {
    step(s, "a peer gets its reply", [i](State& t) {
      Peer& q = t.peers[i];
      q.replied = 1, q.knows = q.request == kAnsweredSuspect, q.request = kNone;
    });
    step(s, "a peer's reply is lost", [i](State& t) { t.peers[i].request = kNone; });
  }
}

void peer_acts(const State& s, int i) {
  const Peer& p = s.peers[i];
  if (simple_peers) peer_renews_simply(s, i);
  else peer_renews(s, i);
  if (p.late) step(s, "a peer's late renewal is executed", [i](State& t) {
    Peer& q = t.peers[i];
    if (q.late == kLateWithAck && t.suspect) q.acked = 1;
    q.late = kNoLate, q.lease = 0;
    forget_waits_that_ended(t);
  });
  // Rule 5. Whether it has Redis is not looked at: it may say "no Redis" at any time, which is the worst that it can do.
  const bool refuses = (p.knows && !peer_supports_suspect && !judges_freshness()) ||
                       (!p.replied && !peer_forgets);
  if (s.poll <= S || poll_counted_from_end)
    if (!p.supports && !refuses && !no_polls)
      step(s, "a peer answers v's poll: no Redis", [i](State& t) { t.peers[i].supports = 1; });
  if (p.replied || p.knows || p.request) step(s, "a peer's agent restarts", [i](State& t) {
    Peer& q = t.peers[i];
    if (q.request == kSentWithAck) q.late = kLateWithAck;
    else if (q.request == kSent && judges_freshness()) q.late = std::max<uint8_t>(q.late, kLatePlain);
    q.request = kNone, q.knows = 0, q.replied = 0;
  });
}

// Rules 6 and 9: control suspects; Redis fails over.
void control_acts(const State& s) {
  if (!judges_freshness() && !s.suspect && !no_polls)
    step(s, "control suspects v", [](State& t) { t.suspect = 1, t.held = 0; });
  if (clock_steps && s.unchanged < lease_over())
    step(s, "Redis's wall clock steps forward", [](State& t) { t.unchanged = static_cast<uint8_t>(lease_over()); });
  if (acks_survive && s.suspect && !s.failed_over && acknowledged(s) != s.replica)
    step(s, "the replica gets the suspicion and its acknowledgements", [](State& t) {
      t.replica = static_cast<uint8_t>(acknowledged(t));
    });
  if ((failover || split) && !s.failed_over)
    step(s, split ? "Redis fails over; the old master goes on serving v" : "Redis fails over, its last writes lost",
         [](State& t) {
           t.failed_over = 1, t.since_failover = 0;
           t.split = split ? 1 : 0;
           const int survived = t.replica;
           withdraw_suspicion(t);
           t.unchanged = static_cast<uint8_t>(lease_over());  // the lease that it has may be as old as can be
           if (acks_survive && survived) {
             t.suspect = 1;
             for (int i = 0; i < N - 1; i++) t.peers[i].acked = i < survived;
           }
         });
}

void expand(const State& s) {
  time_passes(s);
  victim_renews(s);
  victim_polls(s);
  victim_feeds(s);
  victim_restarts(s);
  for (int i = 0; i < N - 1; i++)
    if (i == 0 || !(s.peers[i] == s.peers[i - 1])) peer_acts(s, i);  // the same as what its twin does
  control_acts(s);
}

State beginning() {  // v and its peers have just renewed; with `switching`, v's record has failsafe off
  State s;
  std::memset(&s, 0, sizeof s);
  s.failsafe = s.poll = static_cast<uint8_t>(S + 1);
  for (int i = 0; i < N - 1; i++) s.peers[i].replied = 1;
  return s;
}

void read_arguments(int count, char** words) {
  for (int i = 1; i < count; i++) {
    const std::string word = words[i];
    const size_t equals = word.find('=');
    const auto found = std::find_if(switches.begin(), switches.end(), [&](Switch* s) { return word == s->name; });
    if (found != switches.end()) (*found)->on = true;
    else if (equals != std::string::npos && size.count(word.substr(0, equals)))
      size[word.substr(0, equals)] = std::atoi(word.c_str() + equals + 1);
    else std::fprintf(stderr, "unknown: %s\n", word.c_str()), std::exit(2);
  }
  N = size["N"], T = size["T"], W = size["W"], S = size["S"], L = size["L"], M = size["M"], A = size["A"];
  D = size["D"], Q = size["Q"];
  if (evidence_fresh) evidence = Evidence::Fresh;
  if (evidence_after) evidence = Evidence::After;
  if (evidence_lasting) evidence = Evidence::Lasting;
  if (N < 2 || N > kMaxPeers + 1 || W > T) std::fprintf(stderr, "sizes out of range\n"), std::exit(2);
}

}  // namespace

int main(int count, char** words) {
  read_arguments(count, words);
  Search found;
  search = &found;
  found.reach(beginning(), "the beginning");
  for (size_t at = 0; at < found.count(); at++) {
    const State s = found.state(at);
    found.expanding(at);
    if (may_take_over(s)) {
      std::printf("violated %zu\n", found.count());
      found.tell_way(at);
      return 1;
    }
    expand(s);
  }
  std::printf("safe %zu\n", found.count());
  return 0;
}
