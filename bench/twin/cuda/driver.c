/* Stands for libcuda.so.1, the CUDA driver: what torch's expandable segments and Triton's launcher
   call. Memory, launches and cards are those of the runtime, fakecudart.c, found by dlsym. A handle
   of virtual memory is its size; modules are not read, functions are their names. */
#include <stddef.h>
#include <string.h>
#include <stdlib.h>
#include <dlfcn.h>
typedef int R;
static void *h() {
  static void *x;
  if (!x)
    x = dlopen("libcudart.so.13", 2 | 256);
  return x;
}
#include <sys/mman.h>
R cuMemAddressReserve(unsigned long long *p, size_t n, size_t a, unsigned long long at,
                      unsigned long long f) {
  void *m = mmap((void *)0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
  if (m == MAP_FAILED)
    return 2;
  *p = (unsigned long long)m;
  void (*r)(void *, size_t) = dlsym(h(), "fake_range");
  r(m, n);
  return 0;
}
R cuMemAddressFree(unsigned long long p, size_t n) { return 0; }
R cuMemCreate(unsigned long long *x, size_t n, const void *prop, unsigned long long f) {
  int (*u)(long) = dlsym(h(), "fake_use");
  int e = u((long)n);
  if (e)
    return e;
  *x = n;
  return 0;
}
R cuMemRelease(unsigned long long x) {
  int (*u)(long) = dlsym(h(), "fake_use");
  return u(-(long)x);
}
R cuMemMap(unsigned long long p, size_t n, size_t o, unsigned long long x, unsigned long long f) {
  return 0;
}
R cuMemUnmap(unsigned long long p, size_t n) { return 0; }
R cuMemSetAccess(unsigned long long p, size_t n, const void *d, size_t c) { return 0; }
R cuMemGetAllocationGranularity(size_t *g, const void *p, int f) {
  *g = 2097152;
  return 0;
}
R cuCtxGetLimit(size_t *v, int l) {
  *v = 1024;
  return 0;
}
R cuCtxSetLimit(int l, size_t v) { return 0; }
R cuInit(unsigned f) { return 0; }
R cuDriverGetVersion(int *v) {
  *v = 13000;
  return 0;
}
R cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) {
  *f = 0;
  *a = 1;
  return 0;
}
R cuDevicePrimaryCtxRetain(void **c, int d) {
  *c = (void *)16;
  return 0;
}
R cuCtxGetCurrent(void **c) {
  *c = (void *)16;
  return 0;
}
R cuCtxSetCurrent(void *c) { return 0; }
R cuDeviceGet(int *d, int o) {
  *d = o;
  return 0;
}
R cuDeviceGetCount(int *n) {
  int (*f)(int *) = dlsym(h(), "cudaGetDeviceCount");
  return f(n);
}
R cuDeviceGetAttribute(int *v, int a, int d) {
  int (*f)(int *, int, int) = dlsym(h(), "cudaDeviceGetAttribute");
  return f(v, a, d);
}
R cuGetErrorString(int e, const char **s) {
  *s = "fake driver error";
  return 0;
}
R cuGetErrorName(int e, const char **s) {
  *s = "FAKE";
  return 0;
}
R cuModuleLoadData(void **m, const void *i) {
  *m = malloc(8);
  return 0;
}
R cuModuleGetFunction(void **f, void *m, const char *n) {
  *f = strdup(n);
  return 0;
}
R cuFuncGetAttribute(int *v, int a, void *f) {
  *v = a == 0 ? 1024 : 0;
  return 0;
}
R cuFuncSetAttribute(void *f, int a, int v) { return 0; }
R cuFuncSetCacheConfig(void *f, int c) { return 0; }
R cuModuleUnload(void *m) { return 0; }
typedef struct {
  unsigned gx, gy, gz, bx, by, bz, sh;
  void *st;
  void *at;
  unsigned n;
} C;
R cuLaunchKernelEx(const C *c, void *f, void **a, void **e) {
  int (*l)(void *) = dlsym(h(), "fake_launch");
  return l(c->st);
}
R cuLaunchKernel(void *f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g,
                 unsigned sh, void *st, void **p, void **x) {
  int (*l)(void *) = dlsym(h(), "fake_launch");
  return l(st);
}
R cuOccupancyMaxActiveClusters(int *n, void *f, void *c) {
  *n = 1;
  return 0;
}
R cuPointerGetAttribute(void **d, int a, unsigned long long p) {
  *d = (void *)p;
  return 0;
}
