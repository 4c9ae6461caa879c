-- A dead letter above dead_letters.max_bytes keeps its digest, its length and the beginning of each field: an entry of 300 MB could
-- neither be applied nor buried whole, and kept its worker busy for ever.
--
-- Workers of the version before write neither column, and go on unchanged.

alter table tidegate.dead_letters
    -- How long the whole entry was in its canonical form: 16 bytes of id, then each name and value with 4 bytes of length. Null in
    -- letters of the version before.
    add column bytes     bigint,
    -- Whether fields holds less than the entry had. Such a letter cannot be redriven: its digest shows what it was, its bytes are gone.
    add column shortened boolean not null default false;
