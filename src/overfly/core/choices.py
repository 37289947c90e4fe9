"""Choices that settings and command-line options share. Imports only typing, to keep the command line fast."""

from typing import Literal

Split = Literal["train", "val", "test"]
"""Part of a domain."""
Scene = Literal["urban", "rural"]
"""Kind of scene of LoveDA and of the synthetic world."""
Cache = Literal["memory", "disk", "off"]
"""Location of cached decoded images."""
Precision = Literal["32", "bf16", "16"]
"""Arithmetic in PyTorch: 32 bits, or mixed precision."""
TrainingPrecision = Literal["auto", "32", "bf16", "16"]
"""Arithmetic of training; auto is the fastest of 32 and bf16 on this machine."""
Backend = Literal["auto", "torch", "onnxruntime", "openvino"]
"""Inference runtime; auto is the first one that runs the file."""
ExportFormat = Literal["onnx", "openvino", "torch"]
"""Format of an exported file: .onnx, .xml and .bin, or .pt2."""
ExportPrecision = Literal["32", "16", "int8"]
"""Arithmetic of an exported network: 32 bits, 16 bits, or 8-bit integers."""
ExportOutput = Literal["probabilities", "logits", "classes"]
"""Output of an exported network: probabilities (B, K, H, W), logits (B, K, H, W), or class ids (B, H, W), uint8."""
