// Threads that stay together from one piece of parallel work to the next.
//
// Milestone: M4. vLLM counterpart: none (each of its CPU kernels opens an OpenMP region of its own).
//
// To open and close a parallel region takes 0.9 us where the cores are near each other and 1.7 where they are far. A layer
// does it for its four linears and, with more tokens, for all its eight operators. In a team the others wait in a loop for
// a word of the first thread's, and all it costs is the word's way there and back: 0.05 to 0.3 us.
//
//   thread 0   norm | hand out qkv: a part of it, wait | hand out rotary: ...        everything that is not handed out
//   thread 1   wait |               the rest of it     | wait ...

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

namespace folovllm {

class Team {
 public:
  // Calls f(thread) for each thread from 0 to num_threads, in parallel, and waits for all.
  template <typename F>
  static void run(int64_t num_threads, const F& f) {
    if (current() != nullptr && num_threads > 1) {
      return current()->hand_out(num_threads, f);
    }
    at::parallel_for(0, num_threads, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        f(thread);
      }
    });
  }

  // Calls f(begin, end) for equal parts of 0 .. count, one for each thread or, if that is less, for each `grain`.
  template <typename F>
  static void run_range(int64_t count, int64_t grain, const F& f) {
    const int64_t parts = std::clamp<int64_t>((count + grain - 1) / grain, 1, at::get_num_threads());
    run(parts, [&](int64_t part) { f(count * part / parts, count * (part + 1) / parts); });
  }

  // Calls program() on this thread. Until it returns, its calls of `run` find the other threads waiting.
  template <typename F>
  static void keep(const F& program) {
    const int64_t num_threads = at::get_num_threads();
    if (num_threads == 1 || at::in_parallel_region()) {
      return program();
    }
    Team team(num_threads);
    at::parallel_for(0, num_threads, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
      if (begin > 0) {
        return team.serve(begin, end);
      }
      const Leader leader(team, end);
      program();
    });
  }

 private:
  static constexpr int64_t kOver = -1;
  static constexpr int kPatience = 1 << 14;  // glances, some 0.2 ms; after that the core may be needed elsewhere

  struct alignas(64) Order {  // one line, which travels at once
    std::atomic<int64_t> number{0};
    int64_t num_threads = 0;
    const void* f = nullptr;
    void (*call)(const void* f, int64_t thread) = nullptr;
  };
  struct alignas(64) Done {
    std::atomic<int64_t> number{0};
    std::exception_ptr error;
  };
  struct Leader {  // sends the others home at the end, also when the program throws
    Team& team;
    Leader(Team& led, int64_t own) : team(led) {
      team.own_ = own;
      current() = &team;
    }
    ~Leader() {
      current() = nullptr;
      team.order_.number.store(kOver, std::memory_order_release);
    }
  };

  Order order_;
  std::vector<Done> done_;
  int64_t own_ = 1;  // what threads 0 .. own_ have to do is done by the first: OpenMP may give fewer than were asked for

  explicit Team(int64_t num_threads) : done_(num_threads) {}

  static Team*& current() {
    static thread_local Team* team = nullptr;
    return team;
  }

  template <typename F>
  void hand_out(int64_t num_threads, const F& f) {
    order_.num_threads = num_threads;
    order_.f = &f;
    order_.call = [](const void* body, int64_t thread) { (*static_cast<const F*>(body))(thread); };
    const int64_t number = order_.number.load(std::memory_order_relaxed) + 1;
    order_.number.store(number, std::memory_order_release);
    const int64_t size = static_cast<int64_t>(done_.size());
    std::exception_ptr error = do_part(0, std::min(own_, num_threads));
    error = error ? error : do_part(size, num_threads);  // none, unless inside a region OpenMP is set to have more threads
    for (int64_t thread = own_; thread < size; ++thread) {
      Done& done = done_[thread];
      wait([&] { return done.number.load(std::memory_order_acquire) == number; });
      error = error ? error : std::exchange(done.error, nullptr);
    }
    if (error) {
      std::rethrow_exception(error);
    }
  }

  // Threads begin .. end of every order, until it is over.
  void serve(int64_t begin, int64_t end) {
    for (int64_t last = 0, number = 0;; last = number) {
      wait([&] { return (number = order_.number.load(std::memory_order_acquire)) != last; });
      if (number == kOver) {
        return;
      }
      done_[begin].error = do_part(begin, std::min(end, order_.num_threads));
      for (int64_t thread = begin; thread < end; ++thread) {
        done_[thread].number.store(number, std::memory_order_release);
      }
    }
  }

  std::exception_ptr do_part(int64_t begin, int64_t end) const {
    try {
      for (int64_t thread = begin; thread < end; ++thread) {
        order_.call(order_.f, thread);
      }
    } catch (...) {
      return std::current_exception();
    }
    return nullptr;
  }

  template <typename F>
  static void wait(const F& is_over) {
    for (int glances = 0; !is_over(); ++glances) {
      if (glances >= kPatience) {
        std::this_thread::yield();
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();  // the core's other thread may go on, and leaving the loop costs less
#endif
    }
  }
};

}  // namespace folovllm
