/* Stands for the CUDA runtime and driver on a machine without either: one device that never computes.
 *
 * It has the few calls that torch makes while it traces, lowers and differentiates; whatever is missing here fails as it
 * does without a driver. Preloaded, and found as libcuda.so.1 (fake_device.py, which builds it and defines MAJOR, MINOR,
 * MULTIPROCESSORS, MEMORY and SHARED_PER_BLOCK, and passes triton's copy of CUDA's headers).
 */
#include <string.h>
#include <driver_types.h>

int cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "simulated");
    properties->major = MAJOR;
    properties->minor = MINOR;
    properties->multiProcessorCount = MULTIPROCESSORS;
    properties->totalGlobalMem = MEMORY;
    properties->sharedMemPerBlock = 48 << 10;
    properties->sharedMemPerBlockOptin = SHARED_PER_BLOCK;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 1 << 16;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    return 0;
}
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no GPU here"; return 0; }
int cuGetErrorName(int error, const char **text) { *text = "NO_GPU"; return 0; }
