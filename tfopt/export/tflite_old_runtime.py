"""What tflite-runtime 2.14 cannot run: frozen in 2023, and still the runtime of many devices.

Each line was found by running: `LATEST` by loading a file with each version of each op, the rest by running files of
one op in both runtimes. tests/edge holds the proofs (`make test-edge`).

litert-quantizer leaves the versions of ops as they were in the float file, so types have to be looked at as well.
"""

from __future__ import annotations

from tfopt.export.tflite_file import TfliteFile

_LATEST = {
    1: (
        "ADD_N ASSIGN_VARIABLE ATAN2 BITCAST BITWISE_XOR BROADCAST_ARGS BUCKETIZE CALL_ONCE CEIL COMPLEX_ABS "
        "CONV_3D CONV_3D_TRANSPOSE COS CUMSUM DENSIFY DYNAMIC_UPDATE_SLICE ELU EMBEDDING_LOOKUP_SPARSE EXPAND_DIMS "
        "FLOOR HARD_SWISH HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_LOOKUP HASHTABLE_SIZE IF IMAG "
        "L2_POOL_2D LOCAL_RESPONSE_NORMALIZATION LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR LSH_PROJECTION MATRIX_DIAG "
        "MATRIX_SET_DIAG MULTINOMIAL NEG NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5 ONE_HOT POW PRELU "
        "RANDOM_STANDARD_NORMAL RANDOM_UNIFORM RANK READ_VARIABLE REAL REDUCE_ALL REDUCE_ANY RELU_0_TO_1 "
        "RELU_N1_TO_1 RESHAPE REVERSE_SEQUENCE RFFT2D RIGHT_SHIFT ROUND SCATTER_ND SEGMENT_SUM SHAPE SIN SKIP_GRAM "
        "SQRT SQUARE UNIQUE UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_MIN UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_SUM "
        "VAR_HANDLE WHILE ZEROS_LIKE"
    ),
    2: (
        "DEPTH_TO_SPACE DIV EXP FAKE_QUANT FLOOR_MOD GELU GREATER L2_NORMALIZATION LEAKY_RELU LESS_EQUAL "
        "LOG_SOFTMAX RANGE REDUCE_PROD RSQRT SELECT_V2 SIGN SPACE_TO_DEPTH SPLIT_V SQUARED_DIFFERENCE SQUEEZE SUM "
        "WHERE"
    ),
    3: (
        "ARG_MAX ARG_MIN AVERAGE_POOL_2D BIDIRECTIONAL_SEQUENCE_LSTM BIDIRECTIONAL_SEQUENCE_RNN BROADCAST_TO "
        "EMBEDDING_LOOKUP FLOOR_DIV GREATER_EQUAL LESS LOGISTIC MAX_POOL_2D MEAN MIRROR_PAD NOT_EQUAL QUANTIZE "
        "REDUCE_MAX REDUCE_MIN RELU RELU6 REVERSE_V2 RNN SOFTMAX SPARSE_TO_DENSE TANH TILE TOPK_V2 "
        "UNIDIRECTIONAL_SEQUENCE_RNN"
    ),
    4: (
        "BATCH_MATMUL BATCH_TO_SPACE_ND CONCATENATION EQUAL FILL GATHER_ND LSTM MAXIMUM MINIMUM PACK PAD PADV2 "
        "RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR SELECT SPACE_TO_BATCH_ND SPLIT SVDF TRANSPOSE_CONV "
        "UNIDIRECTIONAL_SEQUENCE_LSTM UNPACK"
    ),
    5: "ABS ADD CAST DEQUANTIZE SUB",
    6: "GATHER SLICE TRANSPOSE",
    7: "CONV_2D DEPTHWISE_CONV_2D MUL",
    8: "STRIDED_SLICE",
    10: "FULLY_CONNECTED",
}
# The latest version of each op that it has; what is missing here, it does not have at all.
LATEST = {op: version for version, ops in _LATEST.items() for op in ops.split()}

_CUSTOM = frozenset({"AudioSpectrogram", "Mfcc", "NumericVerify", "TFLite_Detection_PostProcess"})

# Ops without a kernel for quantized activations of this type; litert-quantizer makes them all the same.
LACKING = {
    "INT8": frozenset({"DIV", "SQRT"}),
    "INT16": frozenset({"DIV", "GELU", "NOT_EQUAL", "RSQRT", "SQRT", "SUM"}),
}


def problems(file: TfliteFile) -> list[str]:
    """Returns what keeps tflite-runtime 2.14 from running a file as it is meant, each as `op version: reason`."""
    found: dict[str, str] = {}
    for op in file.operators():
        latest = 1 if op.name in _CUSTOM else LATEST.get(op.name, 0)
        kinds = {t.type for t in (*op.inputs, *op.outputs) if t.quantized and not t.constant}
        floats = any(t.type == "FLOAT32" for t in op.outputs)
        weights = [t for t in op.inputs if t.constant and t.type in ("INT8", "INT4") and t.quantized]
        reason = None
        if op.version > latest:
            reason = f"it has version {latest}" if latest else "it has no such op"
        elif any(t.type in ("INT4", "INT2") for t in (*op.inputs, *op.outputs)):
            # DEQUANTIZE does not load, CONV_2D gives NaN, FULLY_CONNECTED is right for some weights only.
            reason = "4-bit weights fail to load or compute wrongly there"
        elif lacking := [kind for kind in sorted(kinds) if op.name in LACKING.get(kind, ())]:
            reason = f"it has no kernel for {lacking[0].lower()}"
        elif op.name == "FULLY_CONNECTED" and floats and any(t.per_channel for t in weights):
            reason = "with one scale for each channel and float activations, it computes wrongly there"
        elif op.name == "TRANSPOSE_CONV" and floats and weights:
            reason = "it has no kernel for int8 weights with float activations"
        if reason:
            found.setdefault(f"{op.name} version {op.version}", reason)
    return [f"{op}: {reason}" for op, reason in sorted(found.items())]
