//! The tables of the state, and how an older layout becomes today's.

use super::Store;
use crate::error::{Doing, Result};
use crate::postgres::quote_literal;

/// Every table of the layout.
pub(super) const TABLES: [&str; 14] = [
    "ddl",
    "cutover_step",
    "cutover",
    "request",
    "missing_row",
    "unkeyed_table",
    "given_identity",
    "large_object",
    "held_back",
    "copy_unit",
    "copy_table",
    "worker_progress",
    "progress",
    "move",
];

/// Safe to run again. `progress` has a row of its own, apart from `move`, because it is rewritten by every batch:
/// its fill factor leaves room for heap-only updates.
const LAYOUT: &str = r"
CREATE SCHEMA IF NOT EXISTS pgtandem;

CREATE TABLE IF NOT EXISTS pgtandem.move (
    name             text PRIMARY KEY,
    phase            text NOT NULL,
    phase_since      timestamptz NOT NULL DEFAULT now(),
    source_identity  jsonb NOT NULL,
    slot_lsn         pg_lsn,
    last_cut_lsn     pg_lsn,
    constraints_done boolean NOT NULL DEFAULT false,
    schema_unfinished boolean NOT NULL DEFAULT false,
    schema_in_shares boolean NOT NULL DEFAULT false,
    error            jsonb,
    blockers         jsonb NOT NULL DEFAULT '[]',
    created_at       timestamptz NOT NULL DEFAULT now()
);

DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgtandem.move'::pg_catalog.regclass AND attname = 'schema_in_shares') THEN
        ALTER TABLE pgtandem.move ADD COLUMN schema_in_shares boolean NOT NULL DEFAULT false;
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS pgtandem.progress (
    move         text PRIMARY KEY REFERENCES pgtandem.move ON DELETE CASCADE,
    epoch        bigint NOT NULL DEFAULT 0,
    lsn          pg_lsn NOT NULL DEFAULT '0/0',
    commit_time  timestamptz,
    transactions bigint NOT NULL DEFAULT 0,
    changes      bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 10);

CREATE TABLE IF NOT EXISTS pgtandem.worker_progress (
    move    text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    worker  integer NOT NULL,
    workers integer NOT NULL,
    lsn     pg_lsn NOT NULL,
    split   jsonb NOT NULL,
    PRIMARY KEY (move, worker)
) WITH (fillfactor = 10);

CREATE TABLE IF NOT EXISTS pgtandem.copy_table (
    move        text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    state       text NOT NULL DEFAULT 'pending',
    cut_lsn     pg_lsn,
    rows        bigint NOT NULL DEFAULT 0,
    bytes       bigint NOT NULL DEFAULT 0,
    bytes_total bigint NOT NULL DEFAULT 0,
    shape       text,
    bounds      text[],
    PRIMARY KEY (move, schema_name, table_name)
);
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgtandem.copy_table'::pg_catalog.regclass AND attname = 'shape') THEN
        ALTER TABLE pgtandem.copy_table ADD COLUMN shape text;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgtandem.copy_table'::pg_catalog.regclass AND attname = 'bounds') THEN
        ALTER TABLE pgtandem.copy_table ADD COLUMN bounds text[];
    END IF;
END $$;

-- from_block and to_block are blocks of the heap, or shares of the key where the table has bounds: share 0 ends where bounds[1] begins.
CREATE TABLE IF NOT EXISTS pgtandem.copy_unit (
    move        text NOT NULL,
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    from_block  bigint NOT NULL,
    to_block    bigint,
    cut_lsn     pg_lsn NOT NULL,
    rows        bigint NOT NULL,
    bytes       bigint NOT NULL,
    PRIMARY KEY (move, schema_name, table_name, from_block),
    FOREIGN KEY (move, schema_name, table_name) REFERENCES pgtandem.copy_table
        ON UPDATE CASCADE ON DELETE CASCADE
);

CREATE TABLE IF NOT EXISTS pgtandem.held_back (
    move     text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    ordinal  integer NOT NULL,
    what     text NOT NULL,
    enable   text NOT NULL,
    disable  text NOT NULL,
    PRIMARY KEY (move, ordinal)
);

CREATE TABLE IF NOT EXISTS pgtandem.unkeyed_table (
    move        text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    changes     bigint NOT NULL,
    PRIMARY KEY (move, schema_name, table_name)
);

CREATE TABLE IF NOT EXISTS pgtandem.given_identity (
    move        text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    schema_name text NOT NULL,
    table_name  text NOT NULL,
    before      text NOT NULL,
    source_oid  oid NOT NULL DEFAULT 0,
    PRIMARY KEY (move, source_oid, schema_name, table_name)
);
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgtandem.given_identity'::pg_catalog.regclass AND attname = 'source_oid') THEN
        ALTER TABLE pgtandem.given_identity ADD COLUMN source_oid oid NOT NULL DEFAULT 0,
            DROP CONSTRAINT given_identity_pkey, ADD PRIMARY KEY (move, source_oid, schema_name, table_name);
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS pgtandem.large_object (
    move text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    loid oid NOT NULL,
    PRIMARY KEY (move, loid)
);

CREATE TABLE IF NOT EXISTS pgtandem.request (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    move         text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    kind         text NOT NULL,
    arguments    jsonb NOT NULL,
    state        text NOT NULL DEFAULT 'waiting',
    requested_at timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    answer       jsonb
);

CREATE TABLE IF NOT EXISTS pgtandem.cutover (
    id                  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    move                text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    request_id          bigint,
    state               text NOT NULL,
    started_at          timestamptz NOT NULL DEFAULT now(),
    write_pause_seconds double precision,
    error               jsonb
);

CREATE TABLE IF NOT EXISTS pgtandem.cutover_step (
    cutover_id bigint NOT NULL REFERENCES pgtandem.cutover ON DELETE CASCADE,
    ordinal    integer NOT NULL,
    name       text NOT NULL,
    state      text NOT NULL,
    seconds    double precision,
    detail     text,
    PRIMARY KEY (cutover_id, ordinal)
);

CREATE TABLE IF NOT EXISTS pgtandem.ddl (
    move      text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    lsn       pg_lsn NOT NULL,
    ordinal   integer NOT NULL,
    tag       text NOT NULL,
    statement text NOT NULL,
    role      text NOT NULL,
    state     text NOT NULL,
    error     text,
    seen_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (move, lsn, ordinal)
);

DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgtandem.ddl'::pg_catalog.regclass AND attname = 'position') THEN
        ALTER TABLE pgtandem.ddl ADD COLUMN text_digest text, ADD COLUMN position bigint;
    END IF;
END $$;

CREATE TABLE IF NOT EXISTS pgtandem.missing_row (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    move       text NOT NULL REFERENCES pgtandem.move ON DELETE CASCADE,
    table_name text NOT NULL,
    operation  text NOT NULL,
    lsn        pg_lsn NOT NULL,
    xid        bigint NOT NULL,
    seen_at    timestamptz NOT NULL DEFAULT now()
);
";

impl Store {
    /// Makes the schema and the rows that every later statement expects. Safe to run again and at the same time.
    ///
    /// # Errors
    /// The connection's; class operator without CREATE on the database.
    pub async fn install(&self, source_identity: &serde_json::Value) -> Result<()> {
        let name = quote_literal(self.name.as_str());
        self.execute(&format!(
            "BEGIN;
             SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('pgtandem install', 0));
             {LAYOUT}
             INSERT INTO pgtandem.move (name, phase, source_identity) VALUES ({name}, 'preflight', {identity})
                 ON CONFLICT (name) DO NOTHING;
             INSERT INTO pgtandem.progress (move) VALUES ({name}) ON CONFLICT (move) DO NOTHING;
             COMMIT",
            identity = quote_literal(&source_identity.to_string()),
        ))
        .await
        .doing(|| "making the schema pgtandem on the target")
    }
}
