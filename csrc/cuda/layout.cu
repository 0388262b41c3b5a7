// What the host must know of the compiled structs; python/ntkfast/_cuda/layout.py asks for it in tests.
#include "cuda/conv.cuh"
#include "cuda/slices.cuh"

// Bytes of Job, PrefixLayer<double>, PrefixLayer<float>, GeneralLayer, HermiteTable, TablePanels<double>,
// TablePanels<float>, ConvJob, ConvLayer<double>, ConvLayer<float>, ConvMemory; then shared memory of gram_dense,
// gram_general, gram_table, layer_grams, each for double and float.
extern "C" __global__ void layout(long long* sizes) {
    using namespace ntk;
    const long long all[] = {sizeof(Job), sizeof(PrefixLayer<double>), sizeof(PrefixLayer<float>), sizeof(GeneralLayer),
                             sizeof(HermiteTable), sizeof(TablePanels<double>), sizeof(TablePanels<float>),
                             sizeof(ConvJob), sizeof(ConvLayer<double>), sizeof(ConvLayer<float>), sizeof(ConvMemory),
                             sizeof(GramMemory<double, Recursion<double>>),
                             sizeof(GramMemory<float, Recursion<float>>), sizeof(GramMemory<double, General<double>>),
                             sizeof(GramMemory<float, General<float>>),
                             sizeof(GramMemory<double, Lookup<double>>), sizeof(GramMemory<float, Lookup<float>>),
                             sizeof(SlicesMemory<double>), sizeof(SlicesMemory<float>)};
    for (int k = 0; k < 19; ++k) sizes[k] = all[k];
}
