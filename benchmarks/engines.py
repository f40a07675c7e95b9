"""Find the engine that draws fastest on this CPU: the card's UNet by PyTorch, torch.compile, ONNX Runtime and OpenVINO.

python benchmarks/engines.py [repeats]

An evaluation of the UNet takes two samples of a static shape, as for one guided picture; weights are random. Each
engine runs in the precisions that the engine has for this processor. The columns of the result are the median seconds
of an evaluation, the seconds of the first evaluation, which compiles, and the distance from PyTorch's output in
float32. ONNX Runtime is not part of the suite and is installed into its own folder.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from card_model import save_card_model
from common import ROOT, keep

WORK = ROOT / ".cache" / "benchmark_generate"
RUNTIME = ("onnxruntime==1.32.0", "onnx==1.23.2")


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    from t2i.training.distributed import quiet_libraries

    quiet_libraries()
    import torch

    from t2i.pictures import engines, quantization, sampling

    model = save_card_model(WORK / "model")
    pipeline = sampling.load_pipeline(model)
    if not engines.is_exported(model):
        quantization.export(pipeline, model, 7.5)
    unet = pipeline.unet.eval()
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor(500.0), torch.randn(2, 77, 768))
    arrays = [one.numpy() for one in inputs]
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        wanted = unet(*inputs).sample.numpy()

    def measure(name: str, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        made = np.asarray(call(), np.float32)
        first, seconds = time.perf_counter() - start, []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        error = float(np.sqrt(np.square(made - wanted).mean() / np.square(wanted).mean()))
        found[name] = {
            "seconds": round(statistics.median(seconds[1:]), 4), "first_seconds": round(first, 1), "relative_error": round(error, 5),
        }  # fmt: skip
        print(name, found[name], flush=True)

    def by_torch(module: Any, dtype: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def call() -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return module(*inputs).sample.float().numpy()

        return call

    measure("torch_fp32", by_torch(unet, torch.float32))
    measure("torch_bf16", by_torch(unet, torch.bfloat16))
    converted = engines.convert(pipeline)["unet"]
    openvino = engines.import_openvino()
    core = openvino.Core()
    for name, network, precision in (
        ("openvino_fp32", converted, "f32"),
        ("openvino_bf16", converted, "bf16"),
        ("openvino_int8_convolutions_bf16", core.read_model(model / engines.FOLDER / "unet.xml"), "bf16"),
    ):
        compiled = None

        def by_openvino(network: Any = network, precision: str = precision) -> Any:
            nonlocal compiled
            if compiled is None:
                options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
                fixed = engines.with_samples(network, 2)
                compiled = core.compile_model(fixed, "CPU", options).create_infer_request()
            return compiled.infer(arrays)[0]

        measure(name, by_openvino)
    measure("onnxruntime_fp32", by_runtime(engines._Unet(unet), inputs, arrays))
    for name, dtype in (("torch_compile_fp32", torch.float32), ("torch_compile_bf16", torch.bfloat16)):
        measure(name, by_torch(torch.compile(unet, dynamic=False), dtype))
    best = min((one for one in found if one.startswith("openvino")), key=lambda one: found[one]["seconds"])
    other = min((one for one in found if not one.startswith("openvino")), key=lambda one: found[one]["seconds"])
    keep(
        "engines",
        {
            "ratio": round(found[other]["seconds"] / found[best]["seconds"], 2), "goal": 1.0, "best": best, "next": other,
            "repeats": repeats, "engines": found,
        },
    )  # fmt: skip


def by_runtime(unet: Any, inputs: tuple[Any, ...], arrays: list[np.ndarray]) -> Callable[[], Any]:
    """Return the UNet in ONNX Runtime, whose convolutions on CPUs compute in float32."""
    import torch

    folder = WORK / "onnxruntime"
    if not (folder / "onnxruntime").is_dir():
        words = ["-m", "pip", "install", "--quiet", "--target", str(folder), *RUNTIME, f"numpy=={np.__version__}"]
        subprocess.run([sys.executable, *words], check=True)
    sys.path.append(str(folder))
    import onnxruntime

    names = ["sample", "timestep", "encoder_hidden_states"]
    file = str(WORK / "unet.onnx")
    torch.onnx.export(unet, inputs, file, input_names=names, output_names=["out"], opset_version=18, dynamo=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, dict(zip(names, arrays, strict=True)))[0]


if __name__ == "__main__":
    main()
