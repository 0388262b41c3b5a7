// Numbers of the layers and of the images of convolutional networks.
#include "cuda/conv_images.cuh"

#define NTK_KERNEL(name, call) \
    extern "C" __global__ void __launch_bounds__(256, 2) name(const __grid_constant__ ntk::ConvJob job) { ntk::call(job); }
NTK_KERNEL(conv_layers_f64, conv_layers<double>)
NTK_KERNEL(conv_layers_f32, conv_layers<float>)
NTK_KERNEL(conv_images_fast_f64, conv_images<ntk::FastImages<double>>)
NTK_KERNEL(conv_images_fast_f32, conv_images<ntk::FastImages<float>>)
NTK_KERNEL(conv_images_general_f64, conv_images<ntk::AnyImages>)
