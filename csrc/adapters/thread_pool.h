// Threads for one call where the host lends none: started when the call needs them, gone when it returns, so
// a process that forks or that asked for one thread never owns any.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "core/executor.h"

namespace daco::adapters {

class ThreadPool {
 public:
  explicit ThreadPool(int threads) : threads_(threads < 1 ? 1 : threads) {}

  ~ThreadPool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& w : workers_) w.join();
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  Executor executor() {
    Executor e;
    e.context = this;
    e.threads = threads_;
    e.run = [](void* self, int64_t tasks, void (*body)(void*, int64_t), void* arg) {
      static_cast<ThreadPool*>(self)->run(tasks, body, arg);
    };
    return e;
  }

 private:
  void run(int64_t tasks, void (*body)(void*, int64_t), void* arg) {
    while (static_cast<int>(workers_.size()) < threads_ - 1) workers_.emplace_back([this] { serve(); });
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      arg_ = arg;
      tasks_ = tasks;
      next_.store(0);
      busy_ = static_cast<int>(workers_.size());
      ++round_;
    }
    wake_.notify_all();
    take_tasks();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  void take_tasks() {
    for (int64_t t = next_.fetch_add(1); t < tasks_; t = next_.fetch_add(1)) body_(arg_, t);
  }

  void serve() {
    // Workers start before the first round is announced, so 0 is a round that none has seen.
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return closing_ || round_ != seen; });
        if (closing_) return;
        seen = round_;
      }
      take_tasks();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  const int threads_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> next_{0};
  void (*body_)(void*, int64_t) = nullptr;
  void* arg_ = nullptr;
  int64_t tasks_ = 0;
  int busy_ = 0;
  uint64_t round_ = 0;
  bool closing_ = false;
};

}  // namespace daco::adapters
