// How a row is cached in Node: by hand, or with bentocache. A row with a TTL of 1 s takes 50 ms to load.
// Prints how often twelve readers of this process read it, loaded it, and waited for it.

import { BentoCache, bentostore } from "bentocache";
import { redisDriver } from "bentocache/drivers/redis";
import { setTimeout as sleep } from "node:timers/promises";
import Valkey from "iovalkey";
import Redis from "ioredis";

const url = process.env.VALKEY_URL;
const until = Date.now() + 1000 * Number(process.env.SECONDS);
const seen = { reads: 0, loads: 0, waited: 0 };

async function load() {
  seen.loads += 1;
  await sleep(50);
  return "Ada";
}

function byHand() {
  const server = new Valkey(url.replace("valkey://", "redis://"));
  const read = async () => {
    if ((await server.get("row")) === null) await server.set("row", await load(), "PX", 1000);
  };
  return [read, () => server.disconnect()];
}

function byLibrary() {
  const connection = new Redis(url.replace("valkey://", "redis://"));
  const driver = redisDriver({ connection });
  const cache = new BentoCache({ default: "rows", stores: { rows: bentostore().useL2Layer(driver) } });
  const read = () => cache.getOrSet({ key: "row", ttl: 1000, factory: load });
  return [read, () => cache.disconnectAll()];
}

const [read, close] = process.env.MODE === "library" ? byLibrary() : byHand();

async function readOn() {
  while (Date.now() < until) {
    const begin = Date.now();
    await read();
    seen.reads += 1;
    if (Date.now() - begin >= 25) seen.waited += 1;
    await sleep(1);
  }
}

await Promise.all(Array.from({ length: Number(process.env.READERS) }, readOn));
await close();
console.log(JSON.stringify(seen));
process.exit(0);
