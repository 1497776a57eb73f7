"""A stand-in for `spaces` on ZeroGPU: each call runs in a forked worker, arguments and chunks are pickled, and a call
can be refused as the real one refuses. REFUSE names the title of the refusal; SECONDS collects what was asked for."""

import multiprocessing
import os
import pickle

import gradio as gr

REFUSE = ""
SECONDS = []


def GPU(task, duration=60):  # noqa: N802 - the name of the real one
    def asked(*args):
        SECONDS.append(duration(*args) if callable(duration) else duration)
        if REFUSE:
            raise gr.Error("refused", title=REFUSE)
        ours, theirs = multiprocessing.Pipe()
        parcel = pickle.dumps(args)
        worker = os.fork()
        if not worker:
            _work(task, parcel, theirs)
        theirs.close()
        try:
            yield from _pieces(ours)
        finally:
            ours.close()
            os.waitpid(worker, 0)

    return asked


def _work(task, parcel, pipe):
    try:
        for chunk in task(*pickle.loads(parcel)):
            pipe.send_bytes(pickle.dumps(chunk))
        pipe.send_bytes(pickle.dumps(None))
    finally:
        os._exit(0)


def _pieces(pipe):
    while True:
        try:
            chunk = pickle.loads(pipe.recv_bytes())
        except EOFError:
            raise gr.Error("GPU task aborted", title="ZeroGPU worker error") from None
        if chunk is None:
            return
        yield chunk
