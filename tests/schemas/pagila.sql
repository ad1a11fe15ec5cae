-- A film rental: domains, enums, composite types and keys, full text by trigger, partitions (nested, with keys towards and
-- from them), inheritance, policies, rules, exclusion constraints, statistics, event triggers, and triggers of every state.
-- Roles: rental_owner, rental_staff.

CREATE EXTENSION citext;
CREATE EXTENSION btree_gist WITH SCHEMA public;

CREATE TYPE public.mpaa_rating AS ENUM ('G', 'PG', 'R', 'it''s other');
CREATE DOMAIN public.year AS integer CONSTRAINT year_range CHECK (VALUE BETWEEN 1901 AND 2155);
CREATE TYPE public.address AS (street text, "zip code" text);
CREATE TYPE public.price_range AS RANGE (SUBTYPE = numeric);

CREATE FUNCTION public.touch() RETURNS trigger LANGUAGE plpgsql
    AS $$ BEGIN NEW.last_update := now(); RETURN NEW; END $$;
CREATE FUNCTION public.note_ddl() RETURNS event_trigger LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'an event trigger fired'; END $$;
CREATE FUNCTION public.next_status(integer) RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT $1 + 1';
CREATE AGGREGATE public.glue(text) (SFUNC = textcat, STYPE = text, INITCOND = '');
CREATE OPERATOR public.=>> (LEFTARG = integer, RIGHTARG = integer, FUNCTION = int4pl);
CREATE TEXT SEARCH CONFIGURATION public.film_search (COPY = simple);

CREATE TABLE public.film (
    film_id      integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    title        citext NOT NULL,
    description  text,
    release_year public.year,
    rating       public.mpaa_rating DEFAULT 'G',
    features     text[] DEFAULT '{}',
    prices       public.price_range,
    studio       public.address,
    last_update  timestamptz NOT NULL DEFAULT now(),
    fulltext     tsvector NOT NULL
);
CREATE INDEX film_fulltext ON public.film USING gin (fulltext);
CREATE INDEX film_recent ON public.film (last_update DESC NULLS LAST) WHERE rating <> 'G';
CREATE STATISTICS public.film_numbers (ndistinct, dependencies) ON release_year, rating FROM public.film;
ALTER STATISTICS public.film_numbers OWNER TO rental_owner;
ALTER TABLE public.film ALTER COLUMN release_year SET STATISTICS 500;
CREATE TRIGGER film_fulltext BEFORE INSERT OR UPDATE ON public.film
    FOR EACH ROW EXECUTE FUNCTION tsvector_update_trigger(fulltext, 'pg_catalog.english', description);
CREATE TRIGGER film_touch BEFORE UPDATE ON public.film FOR EACH ROW EXECUTE FUNCTION public.touch();
COMMENT ON TRIGGER film_touch ON public.film IS 'keeps last_update';
CREATE TRIGGER film_always BEFORE UPDATE ON public.film FOR EACH ROW EXECUTE FUNCTION public.touch();
ALTER TABLE public.film ENABLE ALWAYS TRIGGER film_always;
CREATE TRIGGER film_replica BEFORE UPDATE ON public.film FOR EACH ROW EXECUTE FUNCTION public.touch();
ALTER TABLE public.film ENABLE REPLICA TRIGGER film_replica;
CREATE TRIGGER film_off BEFORE UPDATE ON public.film FOR EACH ROW EXECUTE FUNCTION public.touch();
ALTER TABLE public.film DISABLE TRIGGER film_off;

CREATE TABLE public.film_copy (
    film_id integer NOT NULL REFERENCES public.film,
    store   smallint NOT NULL,
    shelf   point,
    PRIMARY KEY (film_id, store)
);
CREATE TABLE public.rental (
    film_id integer NOT NULL,
    store   smallint NOT NULL,
    period  tstzrange NOT NULL,
    CONSTRAINT rental_once EXCLUDE USING gist (film_id WITH =, store WITH =, period WITH &&) DEFERRABLE,
    CONSTRAINT rental_copy FOREIGN KEY (film_id, store) REFERENCES public.film_copy
);
CREATE RULE rental_keep AS ON DELETE TO public.rental DO INSTEAD NOTHING;
COMMENT ON RULE rental_keep ON public.rental IS 'rentals are for ever';
CREATE VIEW public.open_rental AS SELECT * FROM public.rental WHERE upper_inf(period);
CREATE RULE open_rental_insert AS ON INSERT TO public.open_rental
    DO INSTEAD INSERT INTO public.rental VALUES (NEW.film_id, NEW.store, NEW.period);

CREATE TABLE public.payment (
    payment_id  bigint NOT NULL,
    paid_at     date NOT NULL,
    amount      numeric(6, 2),
    film_id     integer REFERENCES public.film,
    last_update timestamptz,
    PRIMARY KEY (payment_id, paid_at)
) PARTITION BY RANGE (paid_at);
CREATE TABLE public.payment_2024 PARTITION OF public.payment FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
CREATE TABLE public.payment_2025 PARTITION OF public.payment FOR VALUES FROM ('2025-01-01') TO ('2026-01-01')
    PARTITION BY HASH (payment_id);
CREATE TABLE public.payment_2025_even PARTITION OF public.payment_2025 FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE public.payment_2025_odd PARTITION OF public.payment_2025 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE INDEX payment_amount ON public.payment (amount);
CREATE TRIGGER payment_touch BEFORE INSERT OR UPDATE ON public.payment FOR EACH ROW EXECUTE FUNCTION public.touch();
ALTER TABLE public.payment_2024 DISABLE TRIGGER payment_touch;
CREATE TABLE public.receipt (
    payment_id bigint,
    paid_at    date,
    FOREIGN KEY (payment_id, paid_at) REFERENCES public.payment
);

CREATE TABLE public.person (person_id integer PRIMARY KEY, name text NOT NULL);
CREATE TABLE public.customer (email citext UNIQUE DEFERRABLE INITIALLY DEFERRED, joined date) INHERITS (public.person);
ALTER TABLE public.customer ENABLE ROW LEVEL SECURITY;
CREATE POLICY staff_sees_all ON public.customer FOR SELECT TO rental_staff USING (true);
CREATE POLICY own_row ON public.customer AS RESTRICTIVE USING (name = CURRENT_USER) WITH CHECK (person_id > 0);
COMMENT ON POLICY own_row ON public.customer IS 'yourself only';
CREATE UNLOGGED TABLE public.session_cache (key text PRIMARY KEY, value jsonb);
CREATE SEQUENCE public.odd_sequence INCREMENT -3 MINVALUE -100 MAXVALUE 20 START 20 CYCLE;
ALTER SEQUENCE public.odd_sequence OWNER TO rental_owner;

CREATE PUBLICATION everything FOR ALL TABLES;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO rental_staff;
GRANT USAGE ON TYPE public.mpaa_rating TO rental_staff;
ALTER TABLE public.film OWNER TO rental_owner;
ALTER DEFAULT PRIVILEGES FOR ROLE rental_owner GRANT EXECUTE ON FUNCTIONS TO rental_staff;

INSERT INTO public.film (title, description, release_year, prices, studio)
    SELECT 'Film ' || n, 'the story of ' || n || ' lost dogs', 1950 + n % 70, '[1,9)', ROW('street ' || n, n)::public.address
    FROM generate_series(1, 200) n;
INSERT INTO public.film_copy SELECT f, s, point(f, s) FROM generate_series(1, 200) f, generate_series(1, 2) s;
INSERT INTO public.rental SELECT f, 1, tstzrange('2024-01-01'::timestamptz + f * interval '1 day', NULL) FROM generate_series(1, 200) f;
INSERT INTO public.payment SELECT n, '2024-06-01'::date + n % 500, n % 90, 1 + n % 200 FROM generate_series(1, 1000) n;
INSERT INTO public.receipt SELECT payment_id, paid_at FROM public.payment WHERE payment_id % 10 = 0;
INSERT INTO public.person SELECT n, 'person ' || n FROM generate_series(1, 20) n;
INSERT INTO public.customer SELECT 100 + n, 'customer ' || n, n || '@example.com', '2024-01-01' FROM generate_series(1, 20) n;

CREATE EVENT TRIGGER no_more_ddl ON ddl_command_start WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE', 'CREATE INDEX')
    EXECUTE FUNCTION public.note_ddl();
COMMENT ON EVENT TRIGGER no_more_ddl IS 'the schema is frozen';
