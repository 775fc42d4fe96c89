"""Small image classifiers, (28, 28, 1) in [0, 1] to 10 classes: NETS, one of each family that quantizers meet, and
COMPRESSED, what the benchmark of compression trains beside them.

Each takes the Keras module to build with: `keras` (3), or `tf_keras` (2) for tools that know no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

CLASSES = 10


def _convolution(k: ModuleType, x, channels: int, size: int, stride: int, activation: str | None):
    """Convolution, batch norm, activation; depthwise where `channels` is 0."""
    layers = k.layers
    options = {"strides": stride, "padding": "same", "use_bias": False}
    x = layers.Conv2D(channels, size, **options)(x) if channels else layers.DepthwiseConv2D(size, **options)(x)
    x = layers.BatchNormalization(momentum=0.95)(x)
    if activation == "relu6":
        return layers.ReLU(6.0)(x)
    if activation == "relu":
        return layers.ReLU()(x)
    if activation == "hard_swish":
        return _hard_swish(k, x)
    return x


def _hard_sigmoid(k: ModuleType, x):
    if k.__version__.startswith("2"):  # of another slope there: the net is only there to be refused
        return k.layers.Activation("hard_sigmoid")(x)
    return k.layers.Rescaling(1 / 6)(k.layers.ReLU(6.0)(k.layers.Rescaling(1.0, offset=3.0)(x)))


def _hard_swish(k: ModuleType, x):
    if k.__version__.startswith("2"):
        return k.layers.Multiply()([x, _hard_sigmoid(k, x)])
    return k.layers.Activation("hard_swish")(x)


def _squeeze_excite(k: ModuleType, x, squeezed: int):
    layers = k.layers
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(squeezed, 1, activation="relu")(gate)
    gate = _hard_sigmoid(k, layers.Conv2D(x.shape[-1], 1)(gate))
    return layers.Multiply()([x, gate])


def _inverted_residual(k: ModuleType, x, channels: int, stride: int, expand: int, activation: str, excite: bool):
    entry, width = x, x.shape[-1] * expand
    x = _convolution(k, x, width, 1, 1, activation)
    x = _convolution(k, x, 0, 3, stride, activation)
    if excite:
        x = _squeeze_excite(k, x, width // 4)
    x = _convolution(k, x, channels, 1, 1, None)
    return k.layers.Add()([entry, x]) if entry.shape == x.shape else x


def _mobile(k: ModuleType, blocks: list[tuple[int, int, int]], activation: str, excite: bool):
    image = k.Input((28, 28, 1), name="image")
    x = _convolution(k, image, 24, 3, 2, activation)
    for channels, stride, expand in blocks:
        x = _inverted_residual(k, x, channels, stride, expand, activation, excite)
    x = _convolution(k, x, 128, 1, 1, activation)
    x = k.layers.GlobalAveragePooling2D()(x)
    return k.Model(image, k.layers.Dense(CLASSES, activation="softmax", name="probabilities")(x))


def mobilenet(k: ModuleType):
    """MobileNetV2's inverted residuals (Sandler et al. 2018): batch norm, ReLU6, depthwise convolutions."""
    blocks = [(16, 1, 3), (32, 2, 4), (32, 1, 4), (48, 1, 4), (48, 1, 4), (48, 1, 4)]  # channels, stride, expansion
    return _mobile(k, blocks, "relu6", excite=False)


def squeeze_excite(k: ModuleType):
    """MobileNetV3's blocks (Howard et al. 2019): the same with squeeze-and-excite gates and hard-swish."""
    blocks = [(16, 1, 3), (32, 2, 4), (32, 1, 4), (48, 1, 4), (48, 1, 4)]
    return _mobile(k, blocks, "hard_swish", excite=True)


def vision_transformer(k: ModuleType, depth: int = 3, width: int = 64):
    """Pre-norm vision transformer (Dosovitskiy et al. 2021) on 7 x 7 tokens.

    Two convolutions make the tokens (Xiao et al. 2021), and the classes see all of these: from bare patches, or by the
    mean of the tokens, it learns far too slowly here.
    """
    layers, count = k.layers, 7 * 7
    image = k.Input((28, 28, 1), name="image")
    x = _convolution(k, _convolution(k, image, 24, 3, 2, "relu6"), 48, 3, 2, "relu6")
    x = layers.Reshape((count, width))(layers.Conv2D(width, 1)(x))
    if not k.__version__.startswith("2"):  # there, too
        x = x + layers.Embedding(count, width, name="positions")(k.ops.arange(0, count))
    for _ in range(depth):
        normed = layers.LayerNormalization(epsilon=1e-6)(x)
        x = layers.Add()([x, layers.MultiHeadAttention(num_heads=4, key_dim=width // 4)(normed, normed)])
        hidden = layers.Dense(2 * width, activation="gelu")(layers.LayerNormalization(epsilon=1e-6)(x))
        x = layers.Add()([x, layers.Dense(width)(hidden)])
    x = layers.Flatten()(layers.LayerNormalization(epsilon=1e-6)(x))
    return k.Model(image, layers.Dense(CLASSES, activation="softmax", name="probabilities")(x))


def lstm(k: ModuleType):
    """Two LSTM layers that read the image row by row."""
    layers = k.layers
    image = k.Input((28, 28, 1), name="image")
    x = layers.LSTM(96, return_sequences=True)(layers.Reshape((28, 28))(image))
    x = layers.LSTM(64)(x)
    return k.Model(image, layers.Dense(CLASSES, activation="softmax", name="probabilities")(x))


def resnet20(k: ModuleType):
    """ResNet-20 for small images (He et al. 2016, section 4.2) at half the resolution, to train four times as fast.

    Where the shape changes, a 1x1 convolution goes beside.
    """
    image = k.Input((28, 28, 1), name="image")
    x = _convolution(k, image, 16, 3, 2, "relu")
    for channels, first in ((16, 1), (32, 2), (64, 2)):
        for stride in (first, 1, 1):
            y = _convolution(k, x, channels, 3, stride, "relu")
            y = _convolution(k, y, channels, 3, 1, None)
            beside = x if x.shape == y.shape else _convolution(k, x, channels, 1, stride, None)
            x = k.layers.ReLU()(k.layers.Add()([beside, y]))
    x = k.layers.GlobalAveragePooling2D()(x)
    return k.Model(image, k.layers.Dense(CLASSES, activation="softmax", name="probabilities")(x))


def vgg(k: ModuleType):
    """Few, wide 3x3 convolutions (Simonyan and Zisserman 2015) with batch norm."""
    layers = k.layers
    image = k.Input((28, 28, 1), name="image")
    x = image
    for channels, stride in ((32, 2), (64, 1), (64, 2), (128, 1)):
        x = _convolution(k, x, channels, 3, stride, "relu")
    x = layers.GlobalAveragePooling2D()(x)
    return k.Model(image, layers.Dense(CLASSES, activation="softmax", name="probabilities")(x))


def perceptron(k: ModuleType, widths: tuple[int, ...] = (1024, 1024), dropout: float = 0.2):
    """Dense layers alone; with 300 and 100 units, LeNet-300-100 (LeCun et al. 1998)."""
    layers = k.layers
    image = k.Input((28, 28, 1), name="image")
    x = layers.Flatten()(image)
    for width in widths:
        x = layers.Dropout(dropout)(layers.Dense(width, activation="relu")(x))
    return k.Model(image, layers.Dense(CLASSES, activation="softmax", name="probabilities")(x))


def lenet5(k: ModuleType, dropout: float = 0.2):
    """LeNet-5 as Caffe has it: 431,080 parameters, the net of Han et al. 2015 and 2016."""
    layers = k.layers
    image = k.Input((28, 28, 1), name="image")
    x = layers.MaxPooling2D()(layers.Conv2D(20, 5)(image))
    x = layers.MaxPooling2D()(layers.Conv2D(50, 5)(x))
    x = layers.Dense(500, activation="relu")(layers.Flatten()(x))
    x = layers.Dropout(dropout)(x)
    return k.Model(image, layers.Dense(CLASSES, activation="softmax", name="probabilities")(x))


NETS: Mapping[str, Callable] = {
    "fashion_mobilenet": mobilenet,
    "fashion_se": squeeze_excite,
    "fashion_vit": vision_transformer,
    "fashion_lstm": lstm,
}

COMPRESSED: Mapping[str, Callable] = {
    "fashion_resnet20": resnet20,
    "fashion_vgg": vgg,
    "fashion_mlp": perceptron,
    "fashion_lenet5": lenet5,
}
