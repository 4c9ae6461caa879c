"""How a row is cached in Python: by hand, or with dogpile.cache and its lock in Valkey. A row with a TTL of 1 s takes 50 ms to load.

Prints how often twelve readers of this process read it, loaded it, and waited for it.
"""

import json
import os
import threading
import time

import valkey
from dogpile.cache import make_region

url = os.environ["VALKEY_URL"]
until = time.monotonic() + float(os.environ["SECONDS"])
reads, loads, waited = [], [], []


def load():
    loads.append(1)
    time.sleep(0.05)
    return "Ada"


server = valkey.from_url(url)
region = make_region().configure(
    "dogpile.cache.redis",
    expiration_time=1,
    arguments={
        "url": url.replace("valkey://", "redis://"),
        "redis_expiration_time": 10,
        "distributed_lock": True,
        "thread_local_lock": False,
    },
)


def by_hand():
    row = server.get("row")
    if row is None:
        row = load()
        server.set("row", row, px=1000)


def by_library():
    region.get_or_create("row", load)


def read_on(read):
    while time.monotonic() < until:
        begin = time.monotonic()
        read()
        reads.append(1)
        if time.monotonic() - begin >= 0.025:
            waited.append(1)
        time.sleep(0.001)


read = by_library if os.environ["MODE"] == "library" else by_hand
readers = [threading.Thread(target=read_on, args=(read,)) for _ in range(int(os.environ["READERS"]))]
for reader in readers:
    reader.start()
for reader in readers:
    reader.join()
print(json.dumps({"reads": len(reads), "loads": len(loads), "waited": len(waited)}))
