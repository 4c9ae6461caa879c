-- The ledger can be walked in the order of ids, so that merging its rows, looking for what Valkey lost, and finding its highest id
-- each read a few rows and not all of a lane.
--
-- Why a btree beside the GiST index: GiST finds overlaps and cannot give rows in order. It costs one more index entry a row, and a row
-- stands for a whole run of entries; merging (src/care/merge.rs) keeps the rows few. Building it locks the ledger against flushes,
-- for about a second a million rows; they wait and go on.
create index ledger_walk on tidegate.ledger (lane, lower(ids));

-- Merging replaces many small rows by one large row, all day long. By default PostgreSQL vacuums when a fifth of a table is dead; a
-- ledger of large rows would hold many dead small ones until then.
alter table tidegate.ledger set (
    autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
    toast.autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_threshold = 1000
);
