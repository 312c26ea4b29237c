// Drives the rules of csrc/thread_attendance.h in simulated time, in which a core is lost exactly when a case says so.
// tests/m4/test_thread_policy.py compiles it and reads what it prints.
//
//   policies      a line for each case: the jobs that are done in ten seconds if the rules decide whether the worker takes
//                 part, if it always does, and if it never does; and the share of jobs in which the rules let it
//   team CASE     a real ThreadTeam, whose leaders' clocks are simulated; prints how often a worker began to sit out
//
// The clocks and the counts of switches are this program's own: it defines clock_gettime and getrusage.

#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace {

using Us = int64_t;  // microseconds

struct Thread {
  Us computed = 0;
  long sleeps = 0, preemptions = 0;
};
std::atomic<Us> now_us = 1'000'000'000;
thread_local Thread this_thread;
thread_local Thread* running = &this_thread;  // the thread that asks for the time

}  // namespace

extern "C" int clock_gettime(clockid_t id, timespec* time) noexcept {
  const Us us = id == CLOCK_THREAD_CPUTIME_ID ? running->computed : now_us.load();
  *time = {us / 1'000'000, us % 1'000'000 * 1000};
  return 0;
}

extern "C" int getrusage(__rusage_who_t, rusage* usage) noexcept {
  *usage = {};
  usage->ru_nvcsw = running->sleeps;
  usage->ru_nivcsw = running->preemptions;
  return 0;
}

#include "thread_team.cpp"

using folovllm::Attendance;
using folovllm::CoreTime;
using folovllm::Spent;
using folovllm::ThreadTeam;
using std::chrono::microseconds;
using std::chrono::nanoseconds;

int64_t ThreadTeam::size() {
  return 2;
}

namespace {

constexpr Us kPart = 30, kGap = 5, kSeconds = 1'000'000;

// When another program has a thread's core: the first `lost` of every `period`, from `offset` on.
struct Rival {
  Us lost = 0, period = kSeconds, offset = 0;

  Us free_from(Us time) const {
    const Us phase = (time + offset) % period;
    return phase < lost ? time + lost - phase : time;
  }
  // When work that begins at `time` is done.
  Us finish(Us time, Us work, Thread& thread) const {
    thread.computed += work;
    while (work > 0) {
      const Us begin = free_from(time), free = period - (begin + offset) % period;
      thread.preemptions += begin > time;
      time = begin + std::min(work, free);
      work -= std::min(work, free);
    }
    return time;
  }
};

enum Policy { kDecides, kAlways, kNever };

// The thread computes or sleeps between two jobs.
using Between = std::function<void(Thread&, int64_t job)>;

struct Case {
  std::string name;
  Rival leader, worker;
  Rival leader_alone;      // while the worker sits out
  int64_t others = 1;      // threads that wait if the worker, or the leader, loses its core
  Between between = [](Thread& leader, int64_t) {
    leader.computed += kGap;
    now_us += kGap;
  };
  Us disk = 0, disk_every = 1;  // the leader's part waits for so long, in each of so many jobs
  bool two_leaders = false;     // two threads lead, five jobs each in turn
  int64_t there_every = 1;      // the worker begins in each of so many jobs, and its clocks see no loss
};

// One leader, and one worker of interest. Each job has a part for each thread.
class Simulation {
 public:
  Simulation(const Case& setting, Policy policy) : setting_(setting), policy_(policy) {
    leaders_[1].computed = 5 * kSeconds;
  }
  void run(Us duration) {
    for (const Us end = now_us + duration; now_us < end; ++jobs) {
      const int which = setting_.two_leaders ? jobs / 5 % 2 : 0;
      running = &leaders_[which];
      setting_.between(*running, jobs);
      do_job(leaders_[which], leader_times_[which]);
    }
    running = &this_thread;
  }
  int64_t jobs = 0, offers = 0;

 private:
  const Case& setting_;
  const Policy policy_;
  Thread leaders_[2], worker_;
  CoreTime leader_times_[2], worker_time_;
  Attendance attendance_;

  // As Team::lead does it.
  void do_job(Thread& leader, CoreTime& leader_time) {
    const bool is_offered = policy_ == kAlways || (policy_ == kDecides && !attendance_.sits_out());
    const Rival& rival = is_offered ? setting_.leader : setting_.leader_alone;
    const Us begin = now_us, part = is_offered ? kPart : kPart + kPart / setting_.others;
    offers += is_offered;
    leader_time.begin();
    Us done = rival.finish(begin, part, leader) + wait_for_disk(leader);
    Us slept = 0;
    if (is_offered) {
      const bool has_begun = jobs % setting_.there_every == 0 && setting_.worker.free_from(begin) < done;
      attendance_.took_offer(has_begun);
      slept = has_begun ? wait_for_worker(begin, done) : 0;
      done = has_begun ? std::max(done, now_us.load()) : rival.finish(done, kPart, leader);
    }
    now_us = done;
    leader.sleeps += slept > 0;
    running = &leader;
    const Spent spent = leader_time.end(microseconds(slept));
    if (is_offered && spent.lost > nanoseconds(0)) {
      attendance_.settle(nanoseconds(0), setting_.others * spent.lost);
    }
  }
  Us wait_for_disk(Thread& leader) const {
    const bool waits = setting_.disk > 0 && jobs % setting_.disk_every == 0;
    leader.sleeps += waits;
    return waits ? setting_.disk : 0;
  }
  // Returns how long the leader slept.
  Us wait_for_worker(Us begin, Us leader_done) {
    running = &worker_;
    now_us = setting_.worker.free_from(begin);
    worker_time_.begin();
    now_us = setting_.worker.finish(now_us, kPart, worker_);
    const Spent spent = worker_time_.end();
    const Us wait = now_us - leader_done, slept = wait > 50 ? wait : 0;
    attendance_.settle(spent.computed, setting_.others * std::min<nanoseconds>(microseconds(slept), spent.lost));
    return slept;
  }
};

Between sleeping(Us us, int every) {
  return [=](Thread& leader, int64_t job) {
    const bool sleeps = job % every == 0;
    leader.sleeps += sleeps;
    leader.computed += sleeps ? 0 : kGap;
    now_us += sleeps ? us : kGap;
  };
}

Rival share(int percent, int period_ms) {
  return {period_ms * percent * 10, period_ms * 1000};
}

std::string percent_of(int percent, int period_ms) {
  return std::to_string(percent) + " % of every " + std::to_string(period_ms) + " ms";
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const std::string& name) -> Case& {
    Case& added = all.emplace_back();
    added.name = name;
    return added;
  };
  add("no loss: the leader computes between jobs");
  for (const int us : {100, 130, 200, 300, 450, 490, 510, 2000}) {
    add("no loss: the leader sleeps " + std::to_string(us) + " us between jobs").between = sleeping(us, 1);
  }
  add("no loss: the leader sleeps 490 us before every 3rd job").between = sleeping(490, 3);
  add("no loss: two leaders in turn").two_leaders = true;
  Case& disk = add("no loss: the leader waits 3 ms for a disk in every 50th job");
  disk.disk = 3000;
  disk.disk_every = 50;
  for (const int period : {9, 24, 48, 100}) {
    for (const int percent : {5, 30, 45, 55, 67, 90}) {
      add("worker: loses " + percent_of(percent, period)).worker = share(percent, period);
    }
  }
  add("worker: loses 30 ms once in a second").worker = share(3, 1000);
  for (const int every : {2, 6, 12, 40}) {
    add("worker: takes one offer in " + std::to_string(every)).there_every = every;
  }
  for (const int period : {8, 22, 28, 100}) {
    for (const int percent : {10, 40, 60, 75}) {
      add("crowded: the leader loses " + percent_of(percent, period)).leader = share(percent, period);
    }
  }
  Case& both = add("crowded: leader and worker lose half of every 8 ms, in turn");
  both.leader = share(50, 8);
  both.worker = {4000, 8000, 4000};
  Case& quota = add("quota: two threads have 25 ms of 100, one has 50");
  quota.leader = quota.worker = share(75, 100);
  quota.leader_alone = share(50, 100);
  for (const int percent : {10, 60, 85, 95}) {
    Case& four = add("four threads: one worker loses " + percent_of(percent, 10));
    four.worker = share(percent, 10);
    four.others = 3;
  }
  return all;
}

void print_policies() {
  for (const Case& setting : cases()) {
    Simulation decides(setting, kDecides), always(setting, kAlways), never(setting, kNever);
    for (Simulation* simulation : {&decides, &always, &never}) {
      simulation->run(10 * kSeconds);
    }
    std::printf("%s;%ld;%ld;%ld;%.3f\n", setting.name.c_str(), decides.jobs, always.jobs, never.jobs,
                static_cast<double>(decides.offers) / decides.jobs);
  }
}

// ---- a real team: what its leaders do is real, and the time that it takes is simulated

// Leads jobs in which the leader is on its core for `computed` of `part` microseconds, and asleep for `gap` in between.
void lead(int jobs, Us part, Us computed, Us gap) {
  for (int job = 0; job < jobs; ++job) {
    const std::thread::id leader = std::this_thread::get_id();
    ThreadTeam::run(2, [&](int64_t index) {
      if (index == 0 && std::this_thread::get_id() == leader) {
        now_us += part;
        this_thread.computed += computed;
      }
    });
    now_us += gap;
  }
}

int64_t absences_in(const std::string& name) {
  if (name == "computes") {
    lead(150, 600, 600, 0);
  } else if (name == "sleeps between jobs") {
    lead(150, 600, 600, 490);
  } else if (name == "two leaders") {  // of which one has computed for 5 seconds before
    for (int turn = 0; turn < 50; ++turn) {
      lead(1, 600, 600, 0);
      std::thread([] {
        this_thread.computed = 5 * kSeconds;
        lead(1, 600, 600, 0);
      }).join();
    }
  } else if (name == "loses its core") {
    lead(150, 600, 0, 0);
  } else if (name == "loses its core, and no worker may sit out") {
    ThreadTeam::disturb(0, /*may_sit_out=*/false);
    lead(150, 600, 0, 0);
  } else {
    return -1;
  }
  return ThreadTeam::stats().absences;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    print_policies();
  } else {
    std::printf("%ld\n", absences_in(argv[2]));
  }
}
