// Preloaded into a process: of its system's calls that concern one folder, one fails, or is its last.
//
// What the C library calls inside of itself (fopen, say) passes by; Python, Arrow and safetensors come through here.

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace {

// How a call ends; a number above 0 is an errno.
constexpr int kKill = -1;  // with the process, before it is made
constexpr int kCut = -2;   // with the process, when half of what it writes is written

char folder[PATH_MAX];
std::atomic<long> calls{0};
long chosen = -1;
int how = 0;
bool and_all_after = false;
int list = -1;

// The place in /proc of a process's file descriptor, where it is a file.
bool path_of(int fd, char (&path)[PATH_MAX]) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
  if (length <= 0) return false;
  path[length] = 0;
  return true;
}

[[noreturn]] void die() {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// How this call is to end; 0: as ever.
int fate(const char* call, const char* path) {
  if (!folder[0] || strncmp(path, folder, strlen(folder)) != 0) return 0;
  const long number = ++calls;
  if (list >= 0) {
    char line[PATH_MAX + 32];
    const int length = snprintf(line, sizeof line, "%09ld%s %s\n", number, call, path);
    syscall(SYS_write, list, line, length);
  }
  const bool removes = strncmp(call, "unlink", 6) == 0 || strcmp(call, "rmdir") == 0;  // on a full disk, too
  if (number != chosen && !(and_all_after && number > chosen && !removes)) return 0;
  if (how == kKill) die();
  return how;
}

int fate(const char* call, int fd) {
  char path[PATH_MAX];
  return folder[0] && path_of(fd, path) ? fate(call, path) : 0;
}

int fate(const char* call, int at, const char* name) {
  if (!folder[0] || !name) return 0;
  if (name[0] == '/') return fate(call, name);
  char path[PATH_MAX];
  if (at == AT_FDCWD ? !getcwd(path, sizeof path) : !path_of(at, path)) return 0;
  const size_t length = strlen(path);
  snprintf(path + length, sizeof path - length, "/%s", name);
  return fate(call, path);
}

int failed(int error) {
  if (error == kCut) die();  // of a call that writes nothing
  errno = error;
  return -1;
}

template <typename Function>
Function* real(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

// Calls that concern what is below `below` are counted from here on. Number `number` ends as `ends` says, and where
// `all_after`, so does each one after it; each is written to the descriptor `to`, where that is none below 0.
void faults_begin(const char* below, long number, int ends, bool all_after, int to) {
  chosen = number, how = ends, and_all_after = all_after, list = to, calls = 0;
  snprintf(folder, sizeof folder, "%s", below);
}

#define CALL(result, name, parameters, arguments, ...)                \
  result name parameters {                                            \
    static const auto call = real<result parameters>(#name);          \
    if (const int end = fate(#name, __VA_ARGS__)) return failed(end); \
    return call arguments;                                            \
  }

#define WRITE(name, parameters, half, arguments)              \
  ssize_t name parameters {                                   \
    static const auto call = real<ssize_t parameters>(#name); \
    if (const int end = fate("write", fd)) {                  \
      if (end == kCut) call half;                             \
      return failed(end);                                     \
    }                                                         \
    return call arguments;                                    \
  }

#define OPEN(name, parameters, arguments, ...)                                                              \
  int name parameters {                                                                                     \
    static const auto call = real<int parameters>(#name);                                                   \
    mode_t mode = 0;                                                                                        \
    if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                                              \
      va_list list;                                                                                         \
      va_start(list, flags);                                                                                \
      mode = va_arg(list, mode_t);                                                                          \
      va_end(list);                                                                                         \
    }                                                                                                       \
    if (const int end = fate(flags & O_ACCMODE ? "open" : "open to read", __VA_ARGS__)) return failed(end); \
    return call arguments;                                                                                  \
  }

WRITE(write, (int fd, const void* data, size_t n), (fd, data, n / 2), (fd, data, n))
WRITE(pwrite, (int fd, const void* data, size_t n, off_t at), (fd, data, n / 2, at), (fd, data, n, at))
WRITE(pwrite64, (int fd, const void* data, size_t n, off64_t at), (fd, data, n / 2, at), (fd, data, n, at))
WRITE(writev, (int fd, const iovec* parts, int n), (fd, parts, n / 2), (fd, parts, n))
OPEN(open, (const char* path, int flags, ...), (path, flags, mode), AT_FDCWD, path)
OPEN(open64, (const char* path, int flags, ...), (path, flags, mode), AT_FDCWD, path)
OPEN(openat, (int at, const char* path, int flags, ...), (at, path, flags, mode), at, path)
OPEN(openat64, (int at, const char* path, int flags, ...), (at, path, flags, mode), at, path)
CALL(ssize_t, read, (int fd, void* data, size_t n), (fd, data, n), fd)
CALL(ssize_t, pread, (int fd, void* data, size_t n, off_t at), (fd, data, n, at), fd)
CALL(ssize_t, pread64, (int fd, void* data, size_t n, off64_t at), (fd, data, n, at), fd)
CALL(ssize_t, preadv, (int fd, const iovec* parts, int n, off_t at), (fd, parts, n, at), fd)
CALL(ssize_t, preadv64, (int fd, const iovec* parts, int n, off64_t at), (fd, parts, n, at), fd)
CALL(int, fsync, (int fd), (fd), fd)
CALL(int, fdatasync, (int fd), (fd), fd)
CALL(int, ftruncate, (int fd, off_t n), (fd, n), fd)
CALL(int, ftruncate64, (int fd, off64_t n), (fd, n), fd)
CALL(int, rename, (const char* from, const char* to), (from, to), AT_FDCWD, to)
CALL(int, renameat, (int from_at, const char* from, int at, const char* to), (from_at, from, at, to), at, to)
CALL(int, link, (const char* from, const char* to), (from, to), AT_FDCWD, to)
CALL(int, unlink, (const char* path), (path), AT_FDCWD, path)
CALL(int, unlinkat, (int at, const char* path, int flags), (at, path, flags), at, path)
CALL(int, mkdir, (const char* path, mode_t mode), (path, mode), AT_FDCWD, path)
CALL(int, rmdir, (const char* path), (path), AT_FDCWD, path)
CALL(int, utimensat, (int at, const char* path, const timespec* times, int flags), (at, path, times, flags), at, path)
}
