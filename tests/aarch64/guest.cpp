// Runs functions of a library for a process on another architecture, which shares memory with this one at the same address.
//
//   guest LIBRARY FD ADDRESS BYTES
//
// FD is that memory. A call comes on stdin as a Call, and what the function returned goes to stdout in 8 bytes.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

struct Call {
  char name[64];
  int64_t whole[32];  // pointers and whole numbers, in order
  float real[8];      // floats, in order
};

// The procedure call standard of aarch64 gives whole numbers and floats registers of their own, eight of each, and puts what is
// left on the stack in eights of bytes. So one type of function stands for all that take up to 32 of the former and 8 of the
// latter: what a callee does not look at does not matter.
typedef int64_t I;
typedef float F;
typedef I (*Function)(I, I, I, I, I, I, I, I, F, F, F, F, F, F, F, F, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I, I,
                      I, I, I, I);

static bool all(ssize_t (*move)(int, void*, size_t), int fd, void* data, size_t size) {
  for (char* at = (char*)data; size;) {
    const ssize_t count = move(fd, at, size);
    if (count <= 0) return false;
    at += count;
    size -= size_t(count);
  }
  return true;
}
static ssize_t write_from(int fd, void* data, size_t size) { return write(fd, data, size); }

int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  void* wanted = (void*)strtoull(argv[3], nullptr, 10);
  const size_t bytes = strtoull(argv[4], nullptr, 10);
  if (mmap(wanted, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, atoi(argv[2]), 0) != wanted) {
    perror("shared memory");
    return 1;
  }
  Call c;
  while (all(read, 0, &c, sizeof c)) {
    const Function call = (Function)dlsym(library, c.name);
    if (!call) {
      fprintf(stderr, "%s\n", dlerror());
      return 1;
    }
    const I* i = c.whole;
    const F* f = c.real;
    I result = call(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], i[8], i[9],
                    i[10], i[11], i[12], i[13], i[14], i[15], i[16], i[17], i[18], i[19], i[20], i[21], i[22], i[23], i[24],
                    i[25], i[26], i[27], i[28], i[29], i[30], i[31]);
    if (!all(write_from, 1, &result, sizeof result)) return 1;
  }
}
