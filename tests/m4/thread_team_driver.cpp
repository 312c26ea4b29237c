// A program that uses ThreadTeam without torch, for the thread sanitizer and for what ends the process if it fails.
// tests/m4/test_thread_team.py compiles it with csrc/thread_team.cpp and runs one of its cases.

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "thread_team.h"
#include "work_ranges.h"

using folovllm::ThreadTeam;
using folovllm::WorkRanges;

namespace {

constexpr int64_t kThreads = 4, kPieces = 100;

std::atomic<int> num_refusals{0};  // of memory that is aligned to more than usual, as a worker's is

void demand(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::_Exit(1);
  }
}

// Each piece is done exactly once, and `run` returns after the last one: the sums are plain numbers that it reads.
void check_jobs(int jobs) {
  for (int job = 0; job < jobs; ++job) {
    std::vector<int64_t> done(kPieces, 0);
    WorkRanges(kPieces, kThreads).for_each([&](int64_t, int64_t piece, int64_t next) {
      demand(next == WorkRanges::kNone || (0 <= next && next < kPieces), "the next piece is a piece");
      done[piece] += 1;
    });
    for (const int64_t count : done) {
      demand(count == 1, "each piece is done once");
    }
    const int64_t parts = 1 + job % (2 * kThreads);  // also more parts than the team has threads
    std::vector<int64_t> part_done(parts, 0);
    ThreadTeam::run(parts, [&](int64_t part) { part_done[part] += part + 1; });
    for (int64_t part = 0; part < parts; ++part) {
      demand(part_done[part] == part + 1, "each part is done once");
    }
  }
}

// An exception of any part reaches the caller after all parts have ended, and the next job runs.
void check_exceptions() {
  for (int64_t bad = 0; bad < kThreads; ++bad) {
    std::atomic<int> others{0};
    bool caught = false;
    try {
      ThreadTeam::run(kThreads, [&](int64_t part) {
        if (part == bad) {
          throw std::runtime_error("part " + std::to_string(part));
        }
        ++others;
      });
    } catch (const std::runtime_error& error) {
      caught = error.what() == "part " + std::to_string(bad);
    }
    demand(caught && others == kThreads - 1, "the exception of a part is thrown again");
    check_jobs(3);
  }
}

// A part that starts a job does it alone.
void check_nesting() {
  std::atomic<int> calls{0};
  ThreadTeam::run(kThreads, [&](int64_t) {
    const std::thread::id self = std::this_thread::get_id();
    ThreadTeam::run(kThreads, [&](int64_t) {
      demand(std::this_thread::get_id() == self, "a job within a job stays on its thread");
      ++calls;
    });
  });
  demand(calls == kThreads * kThreads, "all parts of all inner jobs");
}

// Several threads call at once. None waits for the others' jobs.
void check_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([] { check_jobs(200); });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
}

// The child of a fork has no workers, and starts its own.
void check_fork() {
  check_jobs(10);
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      check_jobs(10);
      std::exit(0);  // with the handlers that end the team
    }
    int status = -1;
    waitpid(child, &status, 0);
    demand(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child computed and ended");
    check_jobs(10);
  }
}

// The child of a fork within a part has none of the threads that do the other parts. Its `run` throws, and does not wait.
// If a worker's part forks, the child has no caller to return to, and ends with a message.
void check_fork_within_a_part(int64_t forking_part) {
  for (bool was_in_time = false; !was_in_time;) {  // until leader and worker do a part each
    pid_t child = -1;
    std::atomic<bool> begun[2] = {false, false};
    std::thread::id done_by[2];
    bool has_thrown = false;
    try {
      ThreadTeam::run(2, [&](int64_t part) {
        done_by[part] = std::this_thread::get_id();
        begun[part] = true;
        const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
        while (!begun[1 - part] && std::chrono::steady_clock::now() < end) {
        }
        if (part == forking_part && begun[1 - part] && done_by[0] != done_by[1]) {
          child = fork();
        }
      });
    } catch (const std::runtime_error& error) {
      has_thrown = std::string(error.what()).find("forked") != std::string::npos;
    }
    if (child == 0) {
      std::_Exit(has_thrown ? 7 : 8);
    }
    was_in_time = child > 0;
    if (was_in_time) {
      int status = -1;
      waitpid(child, &status, 0);
      const bool aborted = WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
      demand(forking_part == 1 ? aborted : WIFEXITED(status) && WEXITSTATUS(status) == 7, "the child ended");
      demand(!has_thrown, "the parent finished its job");
    }
  }
  check_jobs(10);
}

// A job without parts calls nothing, also within another job.
void check_no_parts() {
  std::atomic<int> calls{0};
  ThreadTeam::run(0, [&](int64_t) { ++calls; });
  ThreadTeam::run(kThreads, [&](int64_t) { ThreadTeam::run(0, [&](int64_t) { ++calls; }); });
  demand(calls == 0, "a job without parts calls nothing");
}

// If there is no memory for a worker, the leader does its part. Later the team tries again.
void check_missing_threads() {
  const auto run_job = [] {
    std::atomic<int64_t> done{0};
    ThreadTeam::run(kThreads, [&](int64_t) { ++done; });
    demand(done == kThreads, "all parts are done");
  };
  num_refusals = 2;
  for (int refusals_left = 1; refusals_left >= 0; --refusals_left) {
    run_job();
    run_job();
    demand(num_refusals == refusals_left, "the team asks at once and then not again for a second");
    std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  }
  demand(ThreadTeam::stats().offers == 0 && ThreadTeam::stats().jobs == 4, "the leader did all parts");
  while (ThreadTeam::stats().parts_by_workers < 20) {
    run_job();
  }
}

// The process may end while the workers sleep, and while another thread leads them.
void check_exit(bool busy) {
  check_jobs(10);
  if (busy) {
    std::thread([] { check_jobs(1 << 30); }).detach();
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  std::exit(0);
}

}  // namespace

void* operator new(size_t size, std::align_val_t alignment) {
  if (num_refusals > 0) {
    --num_refusals;
    throw std::bad_alloc();
  }
  const size_t unit = static_cast<size_t>(alignment);
  return std::aligned_alloc(unit, (size + unit - 1) / unit * unit);
}

void operator delete(void* memory, std::align_val_t) noexcept {
  std::free(memory);
}

void operator delete(void* memory, size_t, std::align_val_t) noexcept {
  std::free(memory);
}

int64_t ThreadTeam::size() {
  return kThreads;
}

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  ThreadTeam::disturb(seed, /*may_sit_out=*/seed % 2 == 0);
  if (name == "jobs") {
    while (ThreadTeam::stats().parts_by_workers < 20) {  // the first jobs end before the workers have started
      check_jobs(20);
    }
  } else if (name == "exceptions") {
    check_exceptions();
  } else if (name == "nesting") {
    check_nesting();
  } else if (name == "callers") {
    check_callers();
  } else if (name == "fork") {
    check_fork();
  } else if (name == "fork in the leader's part") {
    check_fork_within_a_part(0);
  } else if (name == "fork in a worker's part") {
    check_fork_within_a_part(1);
  } else if (name == "no parts") {
    check_no_parts();
  } else if (name == "missing threads") {
    check_missing_threads();
  } else if (name == "exit") {
    check_exit(false);
  } else if (name == "busy exit") {
    check_exit(true);
  } else {
    demand(false, "an unknown case");
  }
  std::puts("done");
}
