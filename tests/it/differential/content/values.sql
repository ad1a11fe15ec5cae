-- Every kind of value that has ever been printed by one server and misread by another.

CREATE SCHEMA v;
CREATE SCHEMA ext;
CREATE EXTENSION hstore SCHEMA ext;
CREATE EXTENSION citext SCHEMA ext;

CREATE TYPE v.mood AS ENUM ('sad', '', 'it''s, "ok"', 'a\b');
CREATE TYPE v.pair AS (n int, t text);
CREATE TYPE v.nested AS (p v.pair, many v.pair[], m v.mood);
CREATE DOMAIN v.positive AS numeric CHECK (value > 0);
CREATE DOMAIN v.words AS text[] CHECK (array_length(value, 1) < 10);
CREATE TYPE v.float_range AS RANGE (subtype = float8);

-- One column a type; the rows below put one awkward value after the other into each.
CREATE TABLE v.every_type (
    id int PRIMARY KEY,
    c_bool bool, c_int2 int2, c_int4 int4, c_int8 int8,
    c_float4 float4, c_float8 float8, c_numeric numeric, c_numeric_scaled numeric(30, 10), c_money money,
    c_text text, c_varchar varchar(20), c_char char(7), c_char1 "char", c_name name, c_bytea bytea,
    c_date date, c_time time, c_timetz timetz, c_timestamp timestamp, c_timestamptz timestamptz, c_interval interval,
    c_uuid uuid, c_bit bit(5), c_varbit varbit, c_xml xml, c_json json, c_jsonb jsonb, c_jsonpath jsonpath,
    c_tsvector tsvector, c_tsquery tsquery,
    c_inet inet, c_cidr cidr, c_macaddr macaddr, c_macaddr8 macaddr8,
    c_point point, c_line line, c_lseg lseg, c_box box, c_path path, c_polygon polygon, c_circle circle,
    c_int4range int4range, c_numrange numrange, c_tstzrange tstzrange, c_daterange daterange, c_float_range v.float_range,
    c_mood v.mood, c_pair v.pair, c_nested v.nested, c_positive v.positive, c_words v.words,
    c_hstore ext.hstore, c_citext ext.citext, c_pg_lsn pg_lsn,
    a_int4 int4[], a_text text[], a_float8 float8[], a_numeric numeric[], a_timestamptz timestamptz[], a_bytea bytea[],
    a_mood v.mood[], a_pair v.pair[], a_box box[], a_range int4range[], a_json json[], a_citext ext.citext[]);

CREATE TABLE v.loose (LIKE v.every_type);
ALTER TABLE v.loose REPLICA IDENTITY FULL;

-- The same function fills both tables, before the copy and while changes flow. Each pair is a column and its values.
CREATE FUNCTION v.awkward() RETURNS TABLE (col text, vals text[]) LANGUAGE sql AS $awkward$
    VALUES
    ('c_bool', ARRAY['true', 'false']),
    ('c_int2', ARRAY['-32768', '32767']),
    ('c_int4', ARRAY['-2147483648', '2147483647']),
    ('c_int8', ARRAY['-9223372036854775808', '9223372036854775807']),
    ('c_float4', ARRAY['NaN', 'Infinity', '-Infinity', '-0', '1e-45', '3.4028235e38', '0.1', '16777217']),
    ('c_float8', ARRAY['NaN', 'Infinity', '-Infinity', '-0', '5e-324', '1.7976931348623157e308', '0.1', '1e23']),
    ('c_numeric', ARRAY['NaN', '0', '0.00', '-0.000000000000000000001', '1e1000', repeat('9', 3000) || '.' || repeat('7', 3000), '1.10']),
    ('c_numeric_scaled', ARRAY['NaN', '12345678901234567890.0123456789', '-0.0000000001']),
    ('c_money', ARRAY['-92233720368547758.08', '92233720368547758.07', '1234567.89', '-0.01']),
    ('c_text', ARRAY['', 'null', 'NULL', '\N', '\.', E'a\tb\nc\rd\be\f\v', '\\', '''', '"', E'\x01\x7f', 'ä€𝄞', ' x ', '{}', '(,)', '$1', '%s']),
    ('c_varchar', ARRAY['', 'null', '12345678901234567890', 'äöüß€𝄞äöüß€𝄞äöüß€𝄞äö', '   ']),
    ('c_char', ARRAY['', 'a', '  b', 'äöü€𝄞xy']),
    ('c_char1', ARRAY['', 'x', '\', '"']),
    ('c_name', ARRAY['', 'N', repeat('ä', 31)]),
    ('c_bytea', ARRAY['', '\x', '\x00', '\x5c', '\x' || (SELECT string_agg(lpad(to_hex(i), 2, '0'), '') FROM generate_series(0, 255) i)]),
    ('c_date', ARRAY['infinity', '-infinity', '4713-01-01 BC', '5874897-12-31', '0001-01-01', '0001-12-31 BC', '2024-02-29', '1999-03-02']),
    ('c_time', ARRAY['00:00', '24:00:00', '23:59:59.999999', '00:00:00.000001']),
    ('c_timetz', ARRAY['24:00:00+15:59:59', '00:00-15:59:59', '12:34:56.789+05:30']),
    ('c_timestamp', ARRAY['infinity', '-infinity', '4713-01-01 00:00 BC', '294276-12-31 23:59:59.999999', '0044-03-15 12:00 BC', '1999-03-02 01:02:03.4']),
    ('c_timestamptz', ARRAY['infinity', '-infinity', '4713-01-02 00:00+00 BC', '294276-12-31 23:59:59.999999+00', '2024-03-31 02:30+02', '1890-01-01 00:00:00+01']),
    ('c_interval', ARRAY['0', '-178000000 years', '178000000 years', '1 mon -1 day +00:00:00.000001', '-1 mon +1 day -23:59:59.999999', '100000:00:00', '-00:00:01', '1 year 2 mons -3 days']),
    ('c_uuid', ARRAY['00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff']),
    ('c_bit', ARRAY['00000', '10101']),
    ('c_varbit', ARRAY['', '0', repeat('10', 300)]),
    ('c_xml', ARRAY['', 'text only', '<a/><b/>', '<?xml version="1.0" standalone="yes"?><r>ä&amp;</r>', '<!DOCTYPE a><a/>']),
    ('c_json', ARRAY['null', '""', '{"a" : 1, "a":2 }', ' [1,  1.0,1e2] ', '"\u00e4\n"', '1e400']),
    ('c_jsonb', ARRAY['null', '""', '{"a":1,"a":2}', '[1.0, 1e2, 1.000]', '"\\\u00e4\""', '{"": {"": [[], {}]}}']),
    ('c_jsonpath', ARRAY['$', '$."a b"[*] ? (@ > 1 && @.b like_regex "^\\d+$" flag "i")']),
    ('c_tsvector', ARRAY['', '''it''''s'':1A,3B ''a\\b'':2', 'fat:2,4C cat']),
    ('c_tsquery', ARRAY['', '''it''''s'' & !( b | c:*A <2> d )']),
    ('c_inet', ARRAY['0.0.0.0/0', '::/0', '::ffff:1.2.3.4/128', 'fe80::1/64', '1.2.3.4/8']),
    ('c_cidr', ARRAY['10.0.0.0/8', '::/0', '2001:db8::/32']),
    ('c_macaddr', ARRAY['00:00:00:00:00:00', 'ff:ff:ff:ff:ff:ff']),
    ('c_macaddr8', ARRAY['00:00:00:ff:fe:00:00:00', 'ff:ff:ff:ff:ff:ff:ff:ff']),
    ('c_point', ARRAY['(0,-0)', '(1e-300,1e300)', '(Infinity,-Infinity)', '(NaN,0.1)']),
    ('c_line', ARRAY['{1,-1,0}', '{0,1,-0.1}']),
    ('c_lseg', ARRAY['[(0,0),(0.1,1e10)]']),
    ('c_box', ARRAY['(3,4),(1,2)', '(Infinity,0),(0,-Infinity)']),
    ('c_path', ARRAY['[(0,0),(1,1)]', '((0,0),(1,1),(2,0))']),
    ('c_polygon', ARRAY['((0,0),(0.1,1),(2,0))']),
    ('c_circle', ARRAY['<(0,0),0>', '<(0.1,-1e5),1e-7>']),
    ('c_int4range', ARRAY['empty', '(,)', '[1,5)', '[2147483646,2147483647)']),
    ('c_numrange', ARRAY['empty', '(,)', '[1.10,NaN]', '(-1e50,1e50]']),
    ('c_tstzrange', ARRAY['["2024-01-01 00:00+00",infinity)', '[-infinity,infinity]', '(,"0044-03-15 12:00+00 BC"]']),
    ('c_daterange', ARRAY['[2024-02-29,2024-03-01)', '(,infinity)']),
    ('c_float_range', ARRAY['[-Infinity,0.1)', '(5e-324,NaN]']),
    ('c_mood', ARRAY['sad', '', 'it''s, "ok"', 'a\b']),
    ('c_pair', ARRAY['(,)', '(1,)', '(,"")', '(-1,"a,b""c\\d(e)")', '(0," ")']),
    ('c_nested', ARRAY['("(1,""a,b"")","{""(2,)"",""(,\\""x\\"")""}",sad)', '(,,)', '("(,)",{},"")']),
    ('c_positive', ARRAY['0.00000000000000000000000000000000000001', 'NaN', '1e100']),
    ('c_words', ARRAY['{}', '{"",NULL,"NULL","a,b","{}"," "}']),
    ('c_hstore', ARRAY['', 'a=>NULL, b=>"NULL", ""=>"", "x=>y"=>"\"\\"']),
    ('c_citext', ARRAY['', 'MiXed', 'ÄÖÜ', 'null']),
    ('c_pg_lsn', ARRAY['0/0', 'FFFFFFFF/FFFFFFFF']),
    ('a_int4', ARRAY['{}', '{NULL}', '[-2:0]={1,NULL,3}', '{{1,2},{NULL,4}}', '[0:1][5:5]={{1},{2}}', '{{{1}},{{2}}}']),
    ('a_text', ARRAY['{}', '{""}', '{"NULL",NULL,null}', '{"a\"b\\c","{d}","e,f"," ","\t"}', '[5:5]={x}']),
    ('a_float8', ARRAY['{NaN,Infinity,-Infinity,-0,NULL,0.1}']),
    ('a_numeric', ARRAY['{NaN,0.10,NULL,1e100}']),
    ('a_timestamptz', ARRAY['{infinity,NULL,"0044-03-15 12:00:00.5+00 BC"}']),
    ('a_bytea', ARRAY['{"\\x","\\x00ff5c",NULL}']),
    ('a_mood', ARRAY['{sad,"","it''s, \"ok\"",NULL,"a\\b"}']),
    ('a_pair', ARRAY['{"(1,\"a\"\"b\")",NULL,"(,)"}']),
    ('a_box', ARRAY['{(3,4),(1,2);(1,1),(0,0)}']),
    ('a_range', ARRAY['{empty,"[1,5)",NULL,"(,)"}']),
    ('a_json', ARRAY['{"{\"a\": [1, \"x\"]}",NULL,"null"}']),
    ('a_citext', ARRAY['{A,a,NULL,""}'])
$awkward$;

-- Row n of a table holds the n-th value of each column, or NULL where there are fewer.
CREATE FUNCTION v.fill(into_table regclass, first_id int) RETURNS void LANGUAGE plpgsql AS $fill$
DECLARE
    row_number int;
    columns text;
    literals text;
BEGIN
    FOR row_number IN 1 .. 17 LOOP
        SELECT string_agg(col, ', '), string_agg(coalesce(format('%L::text', vals[row_number]), 'NULL') || '::' || format_type(atttypid, atttypmod), ', ')
          INTO columns, literals
          FROM v.awkward() JOIN pg_attribute ON attrelid = into_table AND attname = col;
        EXECUTE format('INSERT INTO %s (id, %s) SELECT %s, %s', into_table, columns, first_id + row_number, literals);
    END LOOP;
END $fill$;

-- Every value takes the place of every other once: an UPDATE that sets all columns from the next row.
CREATE FUNCTION v.rotate(the_table regclass) RETURNS void LANGUAGE plpgsql AS $rotate$
DECLARE
    columns text;
BEGIN
    SELECT string_agg(col, ', ') INTO columns FROM v.awkward();
    EXECUTE format('UPDATE %1$s t SET (%2$s) = (SELECT %2$s FROM %1$s o WHERE o.id = CASE WHEN t.id %% 100 = 17 THEN t.id - 16 ELSE t.id + 1 END) WHERE id %% 100 BETWEEN 1 AND 17', the_table, columns);
END $rotate$;

SET datestyle = 'ISO, YMD';
SET intervalstyle = 'postgres';
SET timezone = 'UTC';
SET lc_monetary = 'C';
SET xmloption = content;
SET search_path = '';
SELECT v.fill('v.every_type', 0);
SELECT v.fill('v.loose', 0);
SELECT v.fill('v.loose', 0);

-- A table for each type that a primary key may have; the target must find rows by every one of them.
CREATE FUNCTION v.make_keys() RETURNS void LANGUAGE plpgsql AS $keys$
DECLARE
    kind record;
BEGIN
    FOR kind IN
        SELECT col, vals, format_type(atttypid, atttypmod) AS type
          FROM v.awkward() JOIN pg_attribute ON attrelid = 'v.every_type'::regclass AND attname = col
         WHERE col NOT IN ('c_xml', 'c_json', 'c_jsonpath', 'c_point', 'c_line', 'c_lseg', 'c_box', 'c_path', 'c_polygon',
                           'c_circle', 'a_box', 'a_json', 'c_numeric')
    LOOP
        EXECUTE format('CREATE TABLE v.%I (k %s PRIMARY KEY, n int NOT NULL DEFAULT 0, t text)', 'by_' || kind.col, kind.type);
        EXECUTE format('INSERT INTO v.%I (k) SELECT DISTINCT x::%s FROM unnest(%L::text[]) x ON CONFLICT DO NOTHING', 'by_' || kind.col, kind.type, kind.vals);
    END LOOP;
END $keys$;
SELECT v.make_keys();

CREATE FUNCTION v.touch_keys(statement text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, ext AS $keys$
DECLARE
    name text;
BEGIN
    FOR name IN SELECT format('v.%I', relname) FROM pg_class WHERE relnamespace = 'v'::regnamespace AND relname LIKE 'by\_%' AND relkind = 'r' LOOP
        EXECUTE format(statement, name);
    END LOOP;
END $keys$;
