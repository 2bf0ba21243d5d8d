"""A node's software that has been tampered with: the node `east` sends something else that is wrong each round."""

from __future__ import annotations

import os
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from feddm_flwr import client_app
from feddm_flwr.codecs import framing
from feddm_flwr.exchange.channel import exact

SLOW = 80.0

app = ClientApp()
app.query()(client_app.introduce)


@app.train()
def train(message: Message, context: Context) -> Message:
    reply = client_app.train(message, context)
    if context.node_config["node-name"] == "east":
        number = int(message.content.config_records["task"]["round"])
        array = reply.content.array_records["weights"]["frame"]
        array.data = spoil(array.data, number)
    return reply


def spoil(frame: bytes, number: int) -> bytes:
    header, _ = framing.read_header(frame)
    if number == 1:  # a bit flipped on the way
        return frame[:-5] + bytes([frame[-5] ^ 1]) + frame[-4:]
    if number == 2:  # an update without measure
        channel = exact(header.layout, header.size)
        return channel.encode(100 * channel.decode(frame, "weights", number), "weights", number)
    if number == 3:  # more than there is any use for
        return os.urandom(20_000_000)
    time.sleep(SLOW)  # slower than the round's deadline
    return frame
