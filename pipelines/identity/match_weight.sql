-- Splink's query for the model of probabilistic.py, 9003fdcba02cad2f
WITH

__splink__compare_two_records_blocked as (
    select "l"."pair" AS "pair_l", "r"."pair" AS "pair_r", "l"."name" AS "name_l", "r"."name" AS "name_r", "l"."short" AS "short_l", "r"."short" AS "short_r", "l"."given" AS "given_l", "r"."given" AS "given_r", "l"."address" AS "address_l", "r"."address" AS "address_r", "l"."phone" AS "phone_l", "r"."phone" AS "phone_r", "l"."email" AS "email_l", "r"."email" AS "email_r", "l"."local" AS "local_l", "r"."local" AS "local_r", "l"."devices" AS "devices_l", "r"."devices" AS "devices_r", 0 as match_key
    from compared_left as l
    join compared_right as r
    on l.pair = r.pair
),

__splink__df_comparison_vectors as (
    select "pair_l", "pair_r", "name_l", "name_r", "short_l", "short_r", "given_l", "given_r", CASE
        WHEN "name_l" IS NULL OR "name_r" IS NULL THEN -1
        WHEN "name_l" = "name_r" THEN 3
        WHEN left("name_l", 1) = left("name_r", 1) and least(length("name_l"), length("name_r")) >= 9 and damerau_levenshtein("name_l", "name_r") <= (case when least(length("name_l"), length("name_r")) >= 12 then 2 else 1 end) THEN 2
        WHEN "short_l" = "short_r" and (length("given_l") = 1 or length("given_r") = 1) THEN 1
        ELSE 0
    END as gamma_name, "address_l", "address_r", CASE
        WHEN "address_l" IS NULL OR "address_r" IS NULL THEN -1
        WHEN "address_l" = "address_r" THEN 2
        WHEN damerau_levenshtein("address_l", "address_r") <= 2 or (least(length("address_l"), length("address_r")) >= 12 and (starts_with("address_l", "address_r") or starts_with("address_r", "address_l"))) THEN 1
        ELSE 0
    END as gamma_address, "phone_l", "phone_r", CASE
        WHEN "phone_l" IS NULL OR "phone_r" IS NULL THEN -1
        WHEN "phone_l" = "phone_r" THEN 2
        WHEN damerau_levenshtein("phone_l", "phone_r") <= 1 THEN 1
        ELSE 0
    END as gamma_phone, "email_l", "email_r", "local_l", "local_r", CASE
        WHEN "email_l" IS NULL OR "email_r" IS NULL THEN -1
        WHEN "email_l" = "email_r" THEN 3
        WHEN "local_l" = "local_r" THEN 2
        WHEN damerau_levenshtein("email_l", "email_r") <= 2 and regexp_replace("email_l", '[^0-9]', '', 'g') = regexp_replace("email_r", '[^0-9]', '', 'g') THEN 1
        ELSE 0
    END as gamma_email, "devices_l", "devices_r", CASE
        WHEN "devices_l" IS NULL OR "devices_r" IS NULL THEN -1
        WHEN list_has_any("devices_l", "devices_r") THEN 1
        ELSE 0
    END as gamma_devices, match_key
        from __splink__compare_two_records_blocked
),

__splink__df_match_weight_parts as (
    select
    "pair_l",
    "pair_r",
    "name_l",
    "name_r",
    "short_l",
    "short_r",
    "given_l",
    "given_r",
    gamma_name,
    CASE
        WHEN gamma_name = -1 THEN
            cast(0.0 as float8)
        WHEN gamma_name = 3 THEN
            cast(6.866248611111173 as float8)
        WHEN gamma_name = 2 THEN
            cast(5.491853096329675 as float8)
        WHEN gamma_name = 1 THEN
            cast(3.0 as float8)
        WHEN gamma_name = 0 THEN
            cast(-11.673603533168777 as float8)
    END as mw_name,
    "address_l",
    "address_r",
    gamma_address,
    CASE
        WHEN gamma_address = -1 THEN
            cast(0.0 as float8)
        WHEN gamma_address = 2 THEN
            cast(3.321928094887362 as float8)
        WHEN gamma_address = 1 THEN
            cast(2.0 as float8)
        WHEN gamma_address = 0 THEN
            cast(-3.0 as float8)
    END as mw_address,
    "phone_l",
    "phone_r",
    gamma_phone,
    CASE
        WHEN gamma_phone = -1 THEN
            cast(0.0 as float8)
        WHEN gamma_phone = 2 THEN
            cast(4.058893689053568 as float8)
        WHEN gamma_phone = 1 THEN
            cast(4.7369655941662066 as float8)
        WHEN gamma_phone = 0 THEN
            cast(-2.0 as float8)
    END as mw_phone,
    "email_l",
    "email_r",
    "local_l",
    "local_r",
    gamma_email,
    CASE
        WHEN gamma_email = -1 THEN
            cast(0.0 as float8)
        WHEN gamma_email = 3 THEN
            cast(5.0 as float8)
        WHEN gamma_email = 2 THEN
            cast(4.058893689053568 as float8)
        WHEN gamma_email = 1 THEN
            cast(3.321928094887362 as float8)
        WHEN gamma_email = 0 THEN
            cast(-1.5025003405291832 as float8)
    END as mw_email,
    "devices_l",
    "devices_r",
    gamma_devices,
    CASE
        WHEN gamma_devices = -1 THEN
            cast(0.0 as float8)
        WHEN gamma_devices = 1 THEN
            cast(5.321928094887363 as float8)
        WHEN gamma_devices = 0 THEN
            cast(-0.5405683813627028 as float8)
    END as mw_devices,
    match_key
    from __splink__df_comparison_vectors
)
select
cast(-4.247927513443585 as float8) + mw_name + mw_address + mw_phone + mw_email + mw_devices as match_weight,
CASE
        WHEN (cast(-4.247927513443585 as float8) + mw_name + mw_address + mw_phone + mw_email + mw_devices) >= 0 THEN
            1.0 / (1.0 + POWER(cast(2 as float8), -(cast(-4.247927513443585 as float8) + mw_name + mw_address + mw_phone + mw_email + mw_devices)))
        ELSE
            POWER(cast(2 as float8), (cast(-4.247927513443585 as float8) + mw_name + mw_address + mw_phone + mw_email + mw_devices)) /
            (1.0 + POWER(cast(2 as float8), (cast(-4.247927513443585 as float8) + mw_name + mw_address + mw_phone + mw_email + mw_devices)))
    END as match_probability,
"pair_l",
"pair_r",
"name_l",
"name_r",
"short_l",
"short_r",
"given_l",
"given_r",
gamma_name,
mw_name,
"address_l",
"address_r",
gamma_address,
mw_address,
"phone_l",
"phone_r",
gamma_phone,
mw_phone,
"email_l",
"email_r",
"local_l",
"local_r",
gamma_email,
mw_email,
"devices_l",
"devices_r",
gamma_devices,
mw_devices,
match_key
from __splink__df_match_weight_parts
