"""Target openvino: OpenVINO's model.xml and model.bin, in float32."""

from importlib.metadata import version
from pathlib import Path

from vitcut.compact.info import NOTE
from vitcut.exports.settings import ExportSettings
from vitcut.exports.target import Subject, Written
from vitcut.runtimes.onnx_runtime import INPUT_NAME, OUTPUT_NAME
from vitcut.runtimes.open_vino import compile_model, convert, openvino
from vitcut.runtimes.session import in_batches

FILE = "model.xml"
_USE = f"""import openvino

model = openvino.Core().compile_model(
    "{FILE}",
    "CPU",
    # Otherwise OpenVINO computes in bfloat16 where the CPU can; and its snippets can end the
    # process when a cut model runs on 8 images or fewer.
    {{"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"}},
)
logits = model(images)["{OUTPUT_NAME}"]"""


def write(subject: Subject, folder: Path, settings: ExportSettings) -> Written:
    """Write ``model.xml``, whose ``vitcut`` entry says what a user must know, and ``model.bin``."""
    path, batch = folder / FILE, None if settings.batch == "dynamic" else settings.batch
    model = convert(subject.module, subject.examples)
    model.reshape([batch or -1, *subject.examples.shape[1:]])
    model.input(0).get_tensor().set_names({INPUT_NAME})
    model.output(0).get_tensor().set_names({OUTPUT_NAME})
    model.set_rt_info(subject.info.note(), [NOTE])
    openvino.save_model(model, path, compress_to_fp16=False)
    run = compile_model(openvino.Core().read_model(path), threads=1, fused=False)
    return Written(
        file=path,
        run=run if batch is None else in_batches(run, batch),
        tools={name: version(name) for name in ("torch", "openvino")},
        needs=("openvino",),
        use=_USE,
    )
