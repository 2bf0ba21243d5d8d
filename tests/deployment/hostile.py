"""A node's software that has been tampered with: the node `east` sends something else that is wrong each round."""

from __future__ import annotations

import os
import struct
import time
import zlib
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from feddm_flwr import client_app
from feddm_flwr.codecs import framing
from feddm_flwr.codecs.floating import Identity
from feddm_flwr.exchange.channel import exact

SLOW = 70.0

app = ClientApp()
app.query()(client_app.introduce)


@app.train()
def train(message: Message, context: Context) -> Message:
    reply = client_app.train(message, context)
    if context.node_config["node-name"] == "east":
        number = int(message.content.config_records["task"]["round"])
        array = reply.content.array_records["weights"]["frame"]
        array.data = spoil(array.data, number, Path(str(context.node_config["state-path"])))
    return reply


def spoil(frame: bytes, number: int, folder: Path) -> bytes:
    header, offset = framing.read_header(frame)
    honest = exact(header.layout, header.size).decode(frame, "weights", number)
    folder.mkdir(exist_ok=True)
    if number == 1:  # a bit flipped on the way
        (folder / "first").write_bytes(frame)
        return frame[:-5] + bytes([frame[-5] ^ 1]) + frame[-4:]
    if number == 2:  # values that the encoder would refuse
        planes = Identity().encode(torch.full((header.size,), torch.nan), ())
        return framing.write(header, [planes])
    if number == 3:  # an update without measure
        return exact(header.layout, header.size).encode(100 * honest, "weights", number)
    if number == 4:  # what it sent in round 1
        return (folder / "first").read_bytes()
    if number == 5:  # another model
        text = struct.pack("<4sHI", framing.MAGIC, framing.VERSION, 2) + b"{}"
        return text + struct.pack("<I", zlib.crc32(text)) + frame[offset:]
    if number == 6:  # more than there is any use for
        return os.urandom(20_000_000)
    time.sleep(SLOW)  # slower than the round's deadline
    return frame
