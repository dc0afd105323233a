/* Stands for libnvidia-ml.so.1, NVIDIA's management library: what torch asks it as it counts the
   cards and sets up expandable segments. Cards are FAKE_DEVICES in number, no process is on them. */
#include <stdlib.h>
int nvmlInit_v2(void) { return 0; }
int nvmlInit(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *s, void **d) {
  *d = (void *)16;
  return 0;
}
int nvmlDeviceGetNvLinkRemoteDeviceType(void *d, unsigned l, int *t) { return 3; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *d, unsigned l, void *p) { return 3; }
int nvmlDeviceGetComputeRunningProcesses(void *d, unsigned *n, void *i) {
  *n = 0;
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *n, void *i) {
  *n = 0;
  return 0;
}
int nvmlSystemGetCudaDriverVersion_v2(int *v) {
  *v = 13000;
  return 0;
}
int nvmlDeviceGetGpuFabricInfoV(void *d, void *i) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) {
  *d = (void *)16;
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned *n) {
  const char *devices = getenv("FAKE_DEVICES");
  *n = devices ? atoi(devices) : 1;
  return 0;
}
