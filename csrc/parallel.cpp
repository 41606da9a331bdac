// Threads. A loop between two of torch's convolutions is fastest on torch's own team, because its workers keep spinning for
// a while after each region; a second pool would fight them for the cores. So the OpenMP runtime is looked up in the libraries
// that are already mapped and called through a pointer; this module has none of its own. Without one, a small pool runs.
// After fork() neither is touched: their threads do not exist in the child, and waiting for them would never end.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <link.h>
#elif defined(__APPLE__)
#include <mach-o/dyld.h>
#endif

namespace mwm {
namespace {

struct Job {
  RangeBody body;
  void* context;
  int64_t count;
  int64_t parts;

  void run_part(int64_t part) const {
    const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    if (begin < end) body(context, begin, end);
  }
};

// The entry points of the two OpenMP families that are used. Signatures are their public ABI.
struct OpenMP {
  void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  void (*kmpc_fork_call)(void*, int32_t, void (*)(int32_t*, int32_t*, ...), ...) = nullptr;
  void (*kmpc_push_num_threads)(void*, int32_t, int32_t) = nullptr;
  int32_t (*kmpc_global_thread_num)(void*) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  std::string description;

  bool found() const { return gomp_parallel || kmpc_fork_call; }
};

// ident_t of the LLVM and Intel runtimes; flags 2 marks a call of the kmpc interface.
struct Ident {
  int32_t reserved1 = 0, flags = 2, reserved2 = 0, reserved3 = 0;
  const char* source = ";mwm;parallel_run;0;0;;";
};

template <class Function>
void load(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}

bool look_into(const char* path, OpenMP& found) {
  const char* base = std::strrchr(path, '/');
  base = base ? base + 1 : path;
  if (!std::strstr(base, "gomp") && !std::strstr(base, "omp5") && !std::strstr(base, "libomp")) return false;
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return false;
  OpenMP openmp;
  load(library, "omp_get_thread_num", openmp.thread_num);
  load(library, "omp_get_num_threads", openmp.num_threads);
  load(library, "GOMP_parallel", openmp.gomp_parallel);
  if (!openmp.gomp_parallel) {
    load(library, "__kmpc_fork_call", openmp.kmpc_fork_call);
    load(library, "__kmpc_push_num_threads", openmp.kmpc_push_num_threads);
    load(library, "__kmpc_global_thread_num", openmp.kmpc_global_thread_num);
    if (!openmp.kmpc_push_num_threads || !openmp.kmpc_global_thread_num) openmp.kmpc_fork_call = nullptr;
  }
  if (!openmp.found() || !openmp.thread_num || !openmp.num_threads) return false;
  openmp.description = std::string("openmp (") + (openmp.gomp_parallel ? "GOMP_parallel" : "__kmpc_fork_call") + " in " + path + ")";
  found = openmp;
  return true;
}

OpenMP find_openmp() {
  OpenMP found;
#if defined(__linux__)
  // Only names are collected here: dlopen inside the callback could deadlock on the loader's lock.
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        if (info->dlpi_name && *info->dlpi_name) static_cast<std::vector<std::string>*>(data)->push_back(info->dlpi_name);
        return 0;
      },
      &paths);
  // torch's own copy first, should another package have brought a second runtime.
  std::stable_partition(paths.begin(), paths.end(), [](const std::string& path) { return path.find("torch") != std::string::npos; });
  for (const std::string& path : paths)
    if (look_into(path.c_str(), found)) break;
#elif defined(__APPLE__)
  for (uint32_t i = 0; i < _dyld_image_count(); ++i)
    if (look_into(_dyld_get_image_name(i), found)) break;
#endif
  return found;
}

// Used only where no OpenMP runtime is mapped. One job at a time; a second caller runs inline instead of waiting.
class Pool {
 public:
  bool try_run(const Job& job) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int64_t>(workers_) < job.parts - 1) {
        std::thread(&Pool::work, this).detach();
        ++workers_;
      }
      job_ = &job;
      next_ = 0;
      left_ = job.parts;
    }
    wake_.notify_all();
    take_parts();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void work() {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return job_ && next_ < job_->parts; });
      }
      take_parts();
    }
  }

  void take_parts() {
    for (;;) {
      const Job* job;
      int64_t part;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!job_ || next_ >= job_->parts) return;
        job = job_;
        part = next_++;
      }
      job->run_part(part);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--left_ == 0) done_.notify_all();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  const Job* job_ = nullptr;
  int64_t next_ = 0, left_ = 0;
  int workers_ = 0;
};

enum class Mode { kOpenMP, kPool, kInline };

struct Runtime {
  OpenMP openmp = find_openmp();
  Mode mode = openmp.found() ? Mode::kOpenMP : Mode::kPool;
  Pool pool;
};

std::atomic<bool> forked{false};

// Never destroyed: the pool's threads may outlive static destruction.
Runtime& runtime() {
  static Runtime* instance = [] {
    pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
    return new Runtime;
  }();
  return *instance;
}

void openmp_region(const Job& job) {
  const OpenMP& openmp = runtime().openmp;
  const int64_t id = openmp.thread_num(), team = openmp.num_threads();
  // The team may be smaller than asked for (nested regions, limits); the parts stay the same.
  for (int64_t part = id; part < job.parts; part += team) job.run_part(part);
}

void run_openmp(const Job& job) {
  const OpenMP& openmp = runtime().openmp;
  if (openmp.gomp_parallel) {
    openmp.gomp_parallel([](void* data) { openmp_region(*static_cast<const Job*>(data)); }, const_cast<Job*>(&job),
                         static_cast<unsigned>(job.parts), 0);
    return;
  }
  static Ident ident;
  using Microtask = void (*)(int32_t*, int32_t*, ...);
  auto task = [](int32_t*, int32_t*, Job* data) { openmp_region(*data); };
  openmp.kmpc_push_num_threads(&ident, openmp.kmpc_global_thread_num(&ident), static_cast<int32_t>(job.parts));
  openmp.kmpc_fork_call(&ident, 1, reinterpret_cast<Microtask>(+task), &job);
}

}  // namespace

void parallel_run(int64_t count, int64_t grain, int64_t threads, RangeBody body, void* context) {
  if (count <= 0) return;
  const int64_t most = (count + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const Job job{body, context, count, std::min({threads, most, count})};
  const Mode mode = runtime().mode;
  if (job.parts > 1 && mode != Mode::kInline && !forked.load(std::memory_order_relaxed)) {
    if (mode == Mode::kOpenMP) return run_openmp(job);
    if (runtime().pool.try_run(job)) return;
  }
  body(context, 0, count);
}

const char* thread_runtime() {
  if (forked.load() || runtime().mode == Mode::kInline) return "inline";
  return runtime().mode == Mode::kOpenMP ? runtime().openmp.description.c_str() : "pool";
}

bool set_thread_runtime(const char* name) {
  Runtime& now = runtime();
  const std::string wanted = name;
  if (wanted == "openmp" && now.openmp.found()) now.mode = Mode::kOpenMP;
  else if (wanted == "pool") now.mode = Mode::kPool;
  else if (wanted == "inline") now.mode = Mode::kInline;
  else return false;
  return true;
}

}  // namespace mwm
