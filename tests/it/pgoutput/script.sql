-- What is there before the stream begins.
create type mood as enum ('calm', 'wild');
create domain grade as int check (value > 0);
create type pair as (a int, b text);
create schema "Sch.ema";

create table by_key (id int primary key, mood mood, note text, large text);
alter table by_key alter large set storage external;
create table by_index (id int not null unique, note text);
alter table by_index replica identity using index by_index_id_key;
create table in_full (id int, note text, large text);
alter table in_full replica identity full, alter large set storage external;
create table unnamed (id int);
alter table unnamed replica identity nothing;
create table nothing ();
create table parent (id int primary key);
create table child (id int primary key, parent int references parent);
create table "Sch.ema"."Tä""ble" ("cöl.umn 1" int primary key, "\" numeric(10, 2));
create table kinds (
    i int4, none text, t text, b bool, o int8, f float8, n numeric, bytes bytea, at timestamptz, day date, span interval,
    u uuid, j jsonb, ints int[], grade grade, pair pair, primary key (i)
);
-- Fills transactions until they are streamed, and shows nothing.
create table filler (id int);
-- Moves the log on.
create table clock (at timestamptz);

-- Large values, which an update of their row need not send.
insert into by_key values (1, 'calm', 'one', repeat('x', 2040));
insert into in_full values (1, 'one', repeat('y', 2040));

create publication recorded for table by_key, by_index, in_full, unnamed, nothing, parent, child, "Sch.ema"."Tä""ble", kinds;
