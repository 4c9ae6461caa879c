"""What a competent author writes by hand in Python: 10,000 entries a read, coalesced, one upsert, one XACK. At least once.

Ends when there is nothing to read, and prints how long that took.
"""

import asyncio
import json
import os
import time

import asyncpg
import valkey.asyncio

UPSERT = """insert into counters as t (id, value, updated_at)
    select id, delta, now() from unnest($1::text[], $2::int8[]) as d (id, delta)
    on conflict (id) do update set value = t.value + excluded.value, updated_at = excluded.updated_at"""


async def main():
    stream, group = os.environ["STREAM"], os.environ["GROUP"]
    server = valkey.asyncio.from_url(os.environ["VALKEY_URL"])
    database = await asyncpg.connect(os.environ["DATABASE_URL"])
    await server.xgroup_create(stream, group, "0")
    started, done = time.perf_counter(), 0
    while reply := await server.xreadgroup(group, "worker", {stream: ">"}, count=10_000):
        entries = reply[0][1]
        sums = {}
        for _, fields in entries:
            key = fields[b"id"]
            sums[key] = sums.get(key, 0) + int(fields[b"amount"])
        keys = sorted(sums)
        await database.execute(UPSERT, [key.decode() for key in keys], [sums[key] for key in keys])
        await server.xack(stream, group, *[entry for entry, _ in entries])
        done += len(entries)
    print(json.dumps({"seconds": time.perf_counter() - started, "entries": done}))
    await database.close()
    await server.aclose()


asyncio.run(main())
