"""Memory does not grow with the number of pictures, neither where they are prepared nor where they are decoded."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.helpers.pictures import ImageWorkshop, to_file

ROOT = Path(__file__).resolve().parents[3]
NUMBER = 2000
ROW_GROUP = 100
DECODER = """
import os, re, sys
import torch
from data_pipeline.dataset import TokenDataset, build_blend
from data_pipeline.loader import BatchLoader
from data_pipeline.images.decode import ImageDecoder
from data_pipeline.packing.form import SequenceForm
from conf.schema import SourceConfig
from model.hf.image_processing_nemotron_labs_diffusion_vlm import encode_image

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
dataset = TokenDataset(sys.argv[1], SequenceForm(2048, 8, 8), seed=0)
blend = build_blend({"a": dataset}, {"a": SourceConfig(path=sys.argv[1])}, seed=0)
decoder = ImageDecoder(encode_image, 2, lambda images: range(len(images)))
loader = BatchLoader(blend, 2, 2, 0, 1, prefetch_steps=1, decode=decoder)
seen, step, after_first = 0, 0, 0
while seen < int(sys.argv[2]):
    for batch in loader.microbatches(2 * step):
        assert all(image.pixels is not None for image in batch.images)
        seen += len(batch.images)
    step += 1
    if step == 20:
        after_first = resident()
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(seen, after_first, resident(), peak)
"""
PREPARER = """
import re, resource, sys
from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.prepare.run import prepare_source
input_ = InputConfig(kind=DocumentKind.image_chat, files=sys.argv[1], column="texts")
data = DataConfig(tokenizer=sys.argv[3], prepare=PrepareConfig(workers=1, chat_template="chatml", shard_bytes=1e9))
prepare_source("memory", SourceConfig(path=sys.argv[2], input=input_), data)
own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


def run(program: str, *arguments: object) -> list[int]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    return [int(word) for word in subprocess.check_output(command, cwd=ROOT, env=environment, text=True).split()]


def make_picture(number: int) -> bytes:
    """Return a picture of 336 x 280 pixels: 282 kB of noise that nothing compresses."""
    values = np.random.default_rng(number).integers(0, 256, (280, 336, 3), dtype=np.uint8)
    return to_file(Image.fromarray(values), "BMP")


def test_decoding_2000_images_takes_no_more_memory_than_decoding_100(image_workshop: ImageWorkshop) -> None:
    """A batch has some 14 images of 1.1 MB in fp32; 2,000 are 2.3 GB."""
    picture = [base64.b64encode(make_picture(number)).decode() for number in range(20)]
    turn = [{"user": "What?", "assistant": "It is green."}]
    lines = ({"texts": turn, "images": [picture[i % 20]]} for i in range(400))
    path = image_workshop.input / "a.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    image_workshop.prepare(input_={"column": "texts"}, shard_bytes=1e9)
    seen, after_first, after_all, peak = run(DECODER, image_workshop.output, NUMBER)
    assert seen >= NUMBER
    assert after_all - after_first < 100e6 and peak - after_first < 150e6, (after_first, after_all, peak)


def test_preparing_pictures_takes_no_more_memory_when_there_are_more(image_workshop: ImageWorkshop) -> None:
    """800 pictures, all different, are 226 MB. A page of a parquet file, here 28 MB, is in memory as a whole."""
    peaks = {}
    for count in (100, 800):
        path = image_workshop.folder / f"{count}.parquet"
        write_parquet(path, count)
        [peaks[count]] = run(PREPARER, path, image_workshop.folder / str(count), image_workshop.tokenizer_dir)
    assert peaks[800] - peaks[100] < 60e6, peaks


def write_parquet(path: Path, count: int) -> None:
    turn = [{"user": "What?", "assistant": "It is green."}]
    schema: Any = None
    with open(path, "wb") as file:
        writer = None
        for start in range(0, count, ROW_GROUP):
            records = [
                {"images": [{"bytes": make_picture(i), "path": None}], "texts": turn}
                for i in range(start, min(start + ROW_GROUP, count))
            ]
            table = pa.Table.from_pylist(records, schema)
            schema = table.schema
            writer = writer or pq.ParquetWriter(file, schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
