/* Stands for libcudart.so.13, the CUDA runtime, for torch's own CUDA build, which cannot tell the
   difference until it looks at numbers.

   Memory is address space that nothing touches, counted against the card's size; copies of at most
   FAKE_COPY_MIB are made, so that small results can be read. Kernels are counted and not run, so
   streams and events are always done. Capture follows CUDA's rules: calls that it forbids fail and
   invalidate it, a graph is its number of nodes and takes FAKE_NODE_BYTES of memory for each.

   The card is described by environment variables, see `Scenario.environment`. Cards beyond the
   first share its memory. Python reads counts and has allocations refused by the functions fake_*,
   which the driver (driver.c) and cuBLAS's stand-in (stubs.py) call too. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#include <dlfcn.h>
#include <sys/mman.h>
#undef cudaStreamGetCaptureInfo
#define OK cudaSuccess
static pthread_mutex_t L = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last = cudaSuccess;
static __thread enum cudaStreamCaptureMode tmode = cudaStreamCaptureModeGlobal;
static __thread int cur = 0;
static long long envll(const char *n, long long d) {
  const char *s = getenv(n);
  return s ? atoll(s) : d;
}
static size_t total, used, peak, graphs_bytes;
static long long node_bytes;
static int inited, verbose, ndev;
static long launches, memcpys, syncs, mallocs, frees, hostallocs;
static void init(void) {
  if (inited)
    return;
  inited = 1;
  total = (size_t)envll("FAKE_TOTAL_MIB", 24207) << 20;
  used = (size_t)envll("FAKE_USED_MIB", 450) << 20;
  node_bytes = envll("FAKE_NODE_BYTES", 0);
  verbose = (int)envll("FAKE_VERBOSE", 0);
  ndev = (int)envll("FAKE_DEVICES", 1);
}
static cudaError_t err(cudaError_t e) {
  if (e != OK)
    last = e;
  return e;
}
/* the next `failing` allocations of device memory are refused */
static long failing, failed;
void fake_fail(long n) { failing = n; }
static int refused(void) {
  if (failing <= 0)
    return 0;
  failing--;
  failed++;
  return 1;
}
typedef struct Graph {
  long nodes;
  int invalid;
  int mode;
  pthread_t owner;
  unsigned long long id;
  int refs;
} Graph;
typedef struct Stream {
  Graph *g;
  int origin;
  unsigned flags;
  int prio;
  struct Stream *next;
} Stream;
typedef struct Event {
  Graph *g;
} Event;
static Stream *streams;
static Stream legacy;
static unsigned long long nextid = 1;
#define MAXG 64
static Graph *active[MAXG];
static Stream *S(cudaStream_t s) {
  if (!s || s == cudaStreamLegacy || s == cudaStreamPerThread)
    return &legacy;
  return (Stream *)s;
}
/* whether this thread may make a potentially unsafe call now; invalidates what it would harm */
static cudaError_t unsafe_call(const char *what) {
  if (tmode == cudaStreamCaptureModeRelaxed)
    return OK;
  int hit = 0;
  pthread_mutex_lock(&L);
  for (int i = 0; i < MAXG; i++) {
    Graph *g = active[i];
    if (!g)
      continue;
    int mine = pthread_equal(g->owner, pthread_self());
    if ((mine && g->mode != cudaStreamCaptureModeRelaxed) ||
        (!mine && tmode == cudaStreamCaptureModeGlobal && g->mode == cudaStreamCaptureModeGlobal)) {
      g->invalid = 1;
      hit = 1;
    }
  }
  pthread_mutex_unlock(&L);
  if (hit) {
    if (verbose)
      fprintf(stderr, "[twin] %s while capturing\n", what);
    return err(cudaErrorStreamCaptureUnsupported);
  }
  return OK;
}
/* ---------------------------------------------------------------- memory */
typedef struct Range {
  char *p;
  size_t n;
  int kind;
  struct Range *next;
} Range; /* kind 1 device 2 pinned 3 registered */
static Range *ranges;
static Range *find(const void *p) {
  for (Range *r = ranges; r; r = r->next)
    if ((char *)p >= r->p && (char *)p < r->p + r->n)
      return r;
  return 0;
}
static void add(void *p, size_t n, int k) {
  Range *r = malloc(sizeof *r);
  r->p = p;
  r->n = n;
  r->kind = k;
  r->next = ranges;
  ranges = r;
}
static Range *take(void *p) {
  for (Range **q = &ranges; *q; q = &(*q)->next)
    if ((*q)->p == p) {
      Range *r = *q;
      *q = r->next;
      return r;
    }
  return 0;
}
cudaError_t cudaMalloc(void **p, size_t n) {
  init();
  cudaError_t e = unsafe_call("cudaMalloc");
  if (e)
    return e;
  pthread_mutex_lock(&L);
  mallocs++;
  if (refused()) {
    pthread_mutex_unlock(&L);
    *p = 0;
    return err(cudaErrorMemoryAllocation);
  }
  size_t m = (n + 0x1fffff) & ~(size_t)0x1fffff;
  if (used + m > total) {
    pthread_mutex_unlock(&L);
    *p = 0;
    return err(cudaErrorMemoryAllocation);
  }
  void *a = mmap(0, m ? m : 1 << 21, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (a == MAP_FAILED) {
    pthread_mutex_unlock(&L);
    return err(cudaErrorMemoryAllocation);
  }
  used += m;
  if (used > peak)
    peak = used;
  add(a, m, 1);
  pthread_mutex_unlock(&L);
  *p = a;
  return OK;
}
cudaError_t cudaFree(void *p) {
  init();
  if (!p)
    return OK;
  cudaError_t e = unsafe_call("cudaFree");
  if (e)
    return e;
  pthread_mutex_lock(&L);
  frees++;
  Range *r = take(p);
  if (r) {
    munmap(r->p, r->n);
    used -= r->n;
    free(r);
  }
  pthread_mutex_unlock(&L);
  return OK;
}
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) {
  init();
  cudaError_t e = unsafe_call("cudaHostAlloc");
  if (e)
    return e;
  void *a = mmap(0, n ? n : 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  pthread_mutex_lock(&L);
  hostallocs++;
  add(a, n ? n : 4096, 2);
  pthread_mutex_unlock(&L);
  *p = a;
  return OK;
}
cudaError_t cudaFreeHost(void *p) {
  cudaError_t e = unsafe_call("cudaFreeHost");
  if (e)
    return e;
  pthread_mutex_lock(&L);
  Range *r = take(p);
  if (r) {
    munmap(r->p, r->n);
    free(r);
  }
  pthread_mutex_unlock(&L);
  return OK;
}
static size_t pinned_now;
cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) {
  init();
  cudaError_t e = unsafe_call("cudaHostRegister");
  if (e)
    return e;
  size_t lim = (size_t)envll("FAKE_PIN_MIB", 1 << 20) << 20;
  pthread_mutex_lock(&L);
  if (pinned_now + n > lim) {
    pthread_mutex_unlock(&L);
    return err(cudaErrorMemoryAllocation);
  }
  if (find(p)) {
    pthread_mutex_unlock(&L);
    return err(cudaErrorHostMemoryAlreadyRegistered);
  }
  pinned_now += n;
  add(p, n, 3);
  pthread_mutex_unlock(&L);
  return OK;
}
cudaError_t cudaHostUnregister(void *p) {
  cudaError_t e = unsafe_call("cudaHostUnregister");
  if (e)
    return e;
  pthread_mutex_lock(&L);
  Range *r = take(p);
  if (r) {
    pinned_now -= r->n;
    free(r);
  }
  pthread_mutex_unlock(&L);
  return OK;
}
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) {
  init();
  pthread_mutex_lock(&L);
  *f = total - used;
  *t = total;
  pthread_mutex_unlock(&L);
  return OK;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  init();
  memset(a, 0, sizeof *a);
  pthread_mutex_lock(&L);
  Range *r = find(p);
  pthread_mutex_unlock(&L);
  a->type = !r             ? cudaMemoryTypeUnregistered
            : r->kind == 1 ? cudaMemoryTypeDevice
                           : cudaMemoryTypeHost;
  a->device = 0;
  a->devicePointer = r ? (void *)p : 0;
  a->hostPointer = r && r->kind > 1 ? (void *)p : 0;
  return OK;
}
static size_t biggest(void) { return (size_t)envll("FAKE_COPY_MIB", 4) << 20; }
static void move(void *d, const void *s, size_t n) {
  if (n <= biggest())
    memmove(d, s, n);
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  init();
  Stream *q = S(s);
  syncs++;
  if (q->g) {
    q->g->invalid = 1;
    if (verbose)
      fprintf(stderr, "[twin] cudaStreamSynchronize of a capturing stream\n");
    return err(cudaErrorStreamCaptureUnsupported);
  }
  return OK;
}
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k,
                            cudaStream_t st) {
  init();
  memcpys++;
  Stream *q = S(st);
  if (q->g) {
    q->g->nodes++;
    return OK;
  }
  move(d, s, n);
  return OK;
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) {
  cudaError_t e = unsafe_call("cudaMemcpy");
  if (e)
    return e;
  memcpys++;
  move(d, s, n);
  return OK;
}
cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h,
                              enum cudaMemcpyKind k, cudaStream_t st) {
  Stream *q = S(st);
  memcpys++;
  if (q->g) {
    q->g->nodes++;
    return OK;
  }
  if (w * h <= biggest())
    for (size_t i = 0; i < h; i++)
      memmove((char *)d + i * dp, (char *)s + i * sp, w);
  return OK;
}
cudaError_t cudaMemcpyPeerAsync(void *d, int dd, const void *s, int sd, size_t n, cudaStream_t st) {
  return cudaMemcpyAsync(d, s, n, cudaMemcpyDeviceToDevice, st);
}
cudaError_t cudaMemcpyToSymbol(const void *y, const void *s, size_t n, size_t o,
                               enum cudaMemcpyKind k) {
  return OK;
}
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t st) {
  Stream *q = S(st);
  if (q->g) {
    q->g->nodes++;
    return OK;
  }
  if (n <= biggest())
    memset(d, v, n);
  return OK;
}
cudaError_t cudaMemset(void *d, int v, size_t n) { return cudaMemsetAsync(d, v, n, 0); }
/* ---------------------------------------------------------------- streams, events, capture */
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) {
  init();
  Stream *q = calloc(1, sizeof *q);
  q->flags = f;
  q->prio = p;
  *s = (cudaStream_t)q;
  return OK;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) {
  return cudaStreamCreateWithPriority(s, f, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return OK; }
cudaError_t cudaStreamQuery(cudaStream_t s) {
  Stream *q = S(s);
  if (q->g) {
    q->g->invalid = 1;
    return err(cudaErrorStreamCaptureUnsupported);
  }
  return OK;
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) {
  *p = S(s)->prio;
  return OK;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *a, int *b) {
  *a = 0;
  *b = -5;
  return OK;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) {
  init();
  *e = (cudaEvent_t)calloc(1, sizeof(Event));
  return OK;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return OK; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) {
  Stream *q = S(s);
  ((Event *)e)->g = q->g;
  return OK;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  return cudaEventRecordWithFlags(e, s, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
  cudaError_t x = unsafe_call("cudaEventQuery");
  if (x)
    return x;
  if (((Event *)e)->g) {
    ((Event *)e)->g->invalid = 1;
    return err(cudaErrorCapturedEvent);
  }
  return OK;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  cudaError_t x = unsafe_call("cudaEventSynchronize");
  if (x)
    return x;
  if (((Event *)e)->g)
    return err(cudaErrorCapturedEvent);
  return OK;
}
cudaError_t cudaEventElapsedTime(float *m, cudaEvent_t a, cudaEvent_t b) {
  *m = 1.0f;
  return OK;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) {
  Stream *q = S(s);
  Event *v = (Event *)e;
  if (v->g && !q->g)
    q->g = v->g;
  else if (q->g && v->g != q->g &&
           !v->g) { /* a capturing stream waits for work outside of its capture */
    q->g->invalid = 1;
    return err(cudaErrorStreamCaptureIsolation);
  }
  return OK;
}
static Graph *begin(Stream *q, int mode) {
  Graph *g = calloc(1, sizeof *g);
  g->mode = mode;
  g->owner = pthread_self();
  g->id = nextid++;
  q->g = g;
  q->origin = 1;
  for (int i = 0; i < MAXG; i++)
    if (!active[i]) {
      active[i] = g;
      break;
    }
  return g;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
  Stream *q = S(s);
  if (q == &legacy)
    return err(cudaErrorStreamCaptureUnsupported);
  if (q->g)
    return err(cudaErrorIllegalState);
  begin(q, m);
  return OK;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t s, cudaGraph_t g, const cudaGraphNode_t *d,
                                          const cudaGraphEdgeData *x, size_t n,
                                          enum cudaStreamCaptureMode m) {
  return cudaStreamBeginCapture(s, m);
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *out) {
  Stream *q = S(s);
  Graph *g = q->g;
  if (!g)
    return err(cudaErrorIllegalState);
  q->g = 0;
  q->origin = 0;
  for (int i = 0; i < MAXG; i++)
    if (active[i] == g)
      active[i] = 0;
  if (!pthread_equal(g->owner, pthread_self()) && g->mode != cudaStreamCaptureModeRelaxed) {
    *out = 0;
    return err(cudaErrorStreamCaptureWrongThread);
  }
  if (g->invalid) {
    *out = 0;
    return err(cudaErrorStreamCaptureInvalidated);
  }
  *out = (cudaGraph_t)g;
  return OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *o) {
  Stream *q = S(s);
  *o = !q->g           ? cudaStreamCaptureStatusNone
       : q->g->invalid ? cudaStreamCaptureStatusInvalidated
                       : cudaStreamCaptureStatusActive;
  return OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *o,
                                     unsigned long long *id, cudaGraph_t *g,
                                     const cudaGraphNode_t **d, const cudaGraphEdgeData **e,
                                     size_t *n) {
  Stream *q = S(s);
  cudaStreamIsCapturing(s, o);
  if (id)
    *id = q->g ? q->g->id : 0;
  if (g)
    *g = (cudaGraph_t)q->g;
  if (d)
    *d = 0;
  if (e)
    *e = 0;
  if (n)
    *n = 0;
  return OK;
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t s, cudaGraphNode_t *d,
                                                const cudaGraphEdgeData *e, size_t n, unsigned f) {
  return OK;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) {
  enum cudaStreamCaptureMode o = tmode;
  tmode = *m;
  *m = o;
  return OK;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long f) {
  cudaError_t e = unsafe_call("cudaGraphInstantiate");
  if (e)
    return e;
  Graph *h = calloc(1, sizeof *h);
  h->nodes = ((Graph *)g)->nodes;
  size_t n = h->nodes * node_bytes;
  pthread_mutex_lock(&L);
  if (used + n > total) {
    pthread_mutex_unlock(&L);
    free(h);
    return err(cudaErrorMemoryAllocation);
  }
  used += n;
  graphs_bytes += n;
  if (used > peak)
    peak = used;
  pthread_mutex_unlock(&L);
  if (verbose)
    fprintf(stderr, "[twin] graph of %ld nodes instantiated\n", h->nodes);
  *x = (cudaGraphExec_t)h;
  return OK;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) {
  Graph *h = (Graph *)x;
  pthread_mutex_lock(&L);
  used -= h->nodes * node_bytes;
  graphs_bytes -= h->nodes * node_bytes;
  pthread_mutex_unlock(&L);
  free(h);
  return OK;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
  free(g);
  return OK;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
  launches += ((Graph *)x)->nodes; /* the card runs each of them */
  Stream *q = S(s);
  if (q->g)
    q->g->nodes++;
  return OK;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *n, size_t *c) {
  *c = ((Graph *)g)->nodes;
  return OK;
}
cudaError_t cudaDeviceSynchronize(void) {
  init();
  syncs++;
  return unsafe_call("cudaDeviceSynchronize");
}
/* ---------------------------------------------------------------- kernels */
static cudaError_t launch(cudaStream_t s) {
  launches++;
  Stream *q = S(s);
  if (q->g) {
    if (q->g->invalid)
      return err(cudaErrorStreamCaptureInvalidated);
    q->g->nodes++;
  }
  return OK;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t sh, cudaStream_t s) {
  return launch(s);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void **a, size_t sh,
                               cudaStream_t s) {
  return launch(s);
}
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t sh,
                                        cudaStream_t s) {
  return launch(s);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) {
  return launch(c->stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *u) {
  Stream *q = S(s);
  if (q->g) {
    q->g->nodes++;
    return OK;
  }
  f(u);
  return OK;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *u, unsigned fl) {
  f(s, OK, u);
  return OK;
}
cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) {
  *k = (cudaKernel_t)f;
  return OK;
}
char __cudaInitModule(void **h) { return 1; }
static __thread struct {
  dim3 g, b;
  size_t s;
  void *st;
} cfg[16];
static __thread int depth;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, struct CUstream_st *st) {
  cfg[depth].g = g;
  cfg[depth].b = b;
  cfg[depth].s = s;
  cfg[depth].st = st;
  depth = (depth + 1) & 15;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *s, void *st) {
  depth = (depth - 1) & 15;
  *g = cfg[depth].g;
  *b = cfg[depth].b;
  *s = cfg[depth].s;
  *(void **)st = cfg[depth].st;
  return OK;
}
void **__cudaRegisterFatBinary(void *f) {
  static void *h[1];
  return (void **)calloc(1, 8);
}
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
void __cudaRegisterFunction(void **h, const char *a, char *b, const char *c, int d, uint3 *e,
                            uint3 *f, dim3 *g, dim3 *i, int *j) {}
void __cudaRegisterVar(void **h, char *a, char *b, const char *c, int d, size_t e, int f, int g) {}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  a->ptxVersion = 89;
  a->binaryVersion = 89;
  a->maxDynamicSharedSizeBytes = 101376;
  return OK;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { return OK; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t k, enum cudaFuncAttribute a, int v,
                                            int d) {
  return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) {
  *n = 2;
  return OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b,
                                                                   size_t s, unsigned fl) {
  *n = 2;
  return OK;
}
static char symbols[1 << 20];
cudaError_t cudaGetSymbolAddress(void **p, const void *s) {
  *p = symbols;
  return OK;
}
/* ---------------------------------------------------------------- device */
cudaError_t cudaGetDeviceCount(int *n) {
  init();
  *n = ndev;
  return OK;
}
cudaError_t cudaGetDevice(int *d) {
  *d = cur;
  return OK;
}
cudaError_t cudaSetDevice(int d) {
  init();
  if (d < 0 || d >= ndev)
    return err(cudaErrorInvalidDevice);
  cur = d;
  return OK;
}
cudaError_t cudaDriverGetVersion(int *v) {
  *v = 13000;
  return OK;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
  *v = 13000;
  return OK;
}
cudaError_t cudaGetLastError(void) {
  cudaError_t e = last;
  last = OK;
  return e;
}
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(cudaError_t e) {
  switch (e) {
  case 2:
    return "out of memory";
  case 900:
    return "operation not permitted when stream is capturing";
  case 901:
    return "operation failed due to a previous error during capture";
  case 904:
    return "dependency created on uncaptured work in another stream";
  default: {
    static __thread char b[32];
    snprintf(b, 32, "fake error %d", e);
    return b;
  }
  }
}
const char *cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  init();
  memset(p, 0, sizeof *p);
  const char *n = getenv("FAKE_NAME");
  strcpy(p->name, n ? n : "NVIDIA GeForce RTX 4090");
  p->totalGlobalMem = total;
  p->major = (int)envll("FAKE_MAJOR", 8);
  p->minor = (int)envll("FAKE_MINOR", 9);
  p->multiProcessorCount = 128;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 101376;
  p->sharedMemPerMultiprocessor = 102400;
  p->regsPerBlock = 65536;
  p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 1536;
  p->maxThreadsDim[0] = 1024;
  p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = 65535;
  p->maxGridSize[2] = 65535;
  p->l2CacheSize = 75497472;
  p->unifiedAddressing = 1;
  p->canMapHostMemory = 1;
  p->concurrentKernels = 1;
  p->cooperativeLaunch = 1;
  p->textureAlignment = 512;
  p->maxBlocksPerMultiProcessor = 24;
  p->hostRegisterSupported = 1;
  p->totalConstMem = 65536;
  return OK;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  init();
  switch (a) {
  case cudaDevAttrComputeCapabilityMajor:
    *v = (int)envll("FAKE_MAJOR", 8);
    break;
  case cudaDevAttrComputeCapabilityMinor:
    *v = (int)envll("FAKE_MINOR", 9);
    break;
  case cudaDevAttrMultiProcessorCount:
    *v = 128;
    break;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin:
    *v = 101376;
    break;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    *v = 102400;
    break;
  case cudaDevAttrMaxSharedMemoryPerBlock:
    *v = 49152;
    break;
  case cudaDevAttrMaxThreadsPerBlock:
    *v = 1024;
    break;
  case cudaDevAttrWarpSize:
    *v = 32;
    break;
  case cudaDevAttrMaxThreadsPerMultiProcessor:
    *v = 1536;
    break;
  case cudaDevAttrMaxGridDimX:
    *v = 2147483647;
    break;
  case cudaDevAttrMaxGridDimY:
  case cudaDevAttrMaxGridDimZ:
    *v = 65535;
    break;
  case cudaDevAttrCooperativeLaunch:
    *v = 1;
    break;
  case cudaDevAttrMaxBlocksPerMultiprocessor:
    *v = 24;
    break;
  case cudaDevAttrMaxRegistersPerBlock:
    *v = 65536;
    break;
  case cudaDevAttrL2CacheSize:
    *v = 75497472;
    break;
  default:
    *v = 0;
  }
  return OK;
}
cudaError_t cudaDeviceGetPCIBusId(char *b, int n, int d) {
  snprintf(b, n, "0000:01:00.0");
  return OK;
}
cudaError_t cudaDeviceCanAccessPeer(int *v, int a, int b) {
  *v = 0;
  return OK;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *m, int d) {
  *m = 0;
  return OK;
}
static int zero() { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *s, void **f, unsigned v,
                                             unsigned long long fl,
                                             enum cudaDriverEntryPointQueryResult *r) {
  static void *h;
  if (!h)
    h = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
  void *p = h ? dlsym(h, s) : 0;
  *f = p ? p : (void *)zero;
  if (r)
    *r = cudaDriverEntryPointSuccess;
  return OK;
}
/* what Python asks by ctypes */
long fake_stat(int k) {
  switch (k) {
  case 0:
    return launches;
  case 1:
    return memcpys;
  case 2:
    return syncs;
  case 3:
    return mallocs;
  case 4:
    return frees;
  case 5:
    return (long)used;
  case 6:
    return (long)peak;
  case 7:
    return (long)graphs_bytes;
  case 8:
    return hostallocs;
  case 9:
    return (long)pinned_now;
  case 10:
    return failed;
  }
  return -1;
}
void fake_reset_peak(void) { peak = used; }
int fake_launch(void *stream) { return launch((cudaStream_t)stream); }

/* virtual memory management, for expandable segments: handles are sizes */
int fake_use(long n) {
  init();
  pthread_mutex_lock(&L);
  if (n > 0 && (refused() || used + n > total)) {
    pthread_mutex_unlock(&L);
    return 2;
  }
  used += n;
  if (used > peak)
    peak = used;
  if (n > 0)
    mallocs++;
  else
    frees++;
  pthread_mutex_unlock(&L);
  return 0;
}
void fake_range(void *p, size_t n) {
  pthread_mutex_lock(&L);
  add(p, n, 1);
  pthread_mutex_unlock(&L);
}
