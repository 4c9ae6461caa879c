// Workers as people write them by hand, in Node. MODE says which:
//   batch  what a competent author writes: 10,000 entries a read, coalesced, one upsert, one XACK. At least once.
//   dedup  the same, with a row for every entry in the same transaction. Exactly once.
//   naive  what most tutorials show: an upsert and an XACK for each entry. At least once.
// Ends when there is nothing to read, or LIMIT entries are done, and prints how long that took.
import Valkey from 'iovalkey'
import pg from 'pg'

const { VALKEY_URL, DATABASE_URL, STREAM, GROUP, MODE } = process.env
const limit = Number(process.env.LIMIT ?? Infinity)
const valkey = new Valkey(VALKEY_URL)
const db = new pg.Client(DATABASE_URL)
await db.connect()
await valkey.xgroup('CREATE', STREAM, GROUP, '0')

const UPSERT_MANY = `insert into counters as t (id, value, updated_at)
  select id, delta, now() from unnest($1::text[], $2::int8[]) as d (id, delta)
  on conflict (id) do update set value = t.value + excluded.value, updated_at = excluded.updated_at`
const UPSERT_ONE = `insert into counters as t (id, value, updated_at) values ($1, $2, now())
  on conflict (id) do update set value = t.value + excluded.value, updated_at = excluded.updated_at`
const SEE = `insert into processed (stream_id) select unnest($1::text[]) on conflict do nothing returning stream_id`

const delta = ([, fields]) => [fields[1], Number(fields[3])]

async function upsert (entries) {
  const sums = new Map()
  for (const entry of entries) {
    const [id, amount] = delta(entry)
    sums.set(id, (sums.get(id) ?? 0) + amount)
  }
  const ids = [...sums.keys()].sort()
  await db.query({ name: 'many', text: UPSERT_MANY, values: [ids, ids.map(id => sums.get(id))] })
}

const modes = {
  async batch (entries) {
    await upsert(entries)
    await valkey.xack(STREAM, GROUP, ...entries.map(([id]) => id))
  },
  async dedup (entries) {
    await db.query('begin')
    const { rows } = await db.query({ name: 'see', text: SEE, values: [entries.map(([id]) => id)] })
    const unseen = new Set(rows.map(row => row.stream_id))
    await upsert(entries.filter(([id]) => unseen.has(id)))
    await db.query('commit')
    await valkey.xack(STREAM, GROUP, ...entries.map(([id]) => id))
  },
  async naive (entries) {
    for (const entry of entries) {
      await db.query({ name: 'one', text: UPSERT_ONE, values: delta(entry) })
      await valkey.xack(STREAM, GROUP, entry[0])
    }
  }
}

const started = performance.now()
let done = 0
while (done < limit) {
  const count = Math.min(10_000, limit - done)
  const reply = await valkey.xreadgroup('GROUP', GROUP, 'worker', 'COUNT', count, 'STREAMS', STREAM, '>')
  if (!reply) break
  const entries = reply[0][1]
  await modes[MODE](entries)
  done += entries.length
}
console.log(JSON.stringify({ seconds: (performance.now() - started) / 1000, entries: done }))
await db.end()
valkey.disconnect()
