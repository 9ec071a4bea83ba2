"""Triton peer: the network of benchmarks/serving.py behind NVIDIA's Triton, as nvidia-pytriton serves Python.

Run by an interpreter of its own, because nvidia-pytriton asks for older numpy and protobuf than ours. The network comes
as TorchScript, from a file: history in, the best rows and their scores out. Histories come with the request, which
spares Triton the store; Triton forms the batches.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

NAME = "recommend"
LARGEST_BATCH = 32


def serve(network_path: str, port: int, length: int, count: int) -> None:
    """Serve until killed; print one line when ready."""
    import numpy as np
    import torch
    from pytriton.decorators import batch
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    torch.set_num_threads(1)
    network = torch.jit.load(network_path)

    @batch  # type: ignore[untyped-decorator]
    def infer(history: Any) -> dict[str, Any]:
        with torch.inference_mode():
            scores, rows = network(torch.from_numpy(np.ascontiguousarray(history)))
        return {"rows": rows.numpy(), "scores": scores.numpy()}

    config = TritonConfig(grpc_port=port, grpc_address="127.0.0.1", allow_http=False, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=NAME,
            infer_func=infer,
            inputs=[Tensor(name="history", dtype=np.int64, shape=(3, length))],
            outputs=[
                Tensor(name="rows", dtype=np.int64, shape=(count,)),
                Tensor(name="scores", dtype=np.float32, shape=(count,)),
            ],
            config=ModelConfig(max_batch_size=LARGEST_BATCH, batcher=DynamicBatcher()),
        )
        triton.run()
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    # The folder with torch comes last: what nvidia-pytriton brings has precedence.
    sys.path.append(sys.argv[1])
    serve(sys.argv[2], *(int(number) for number in sys.argv[3:6]))
