-- A role and a database per service, made when the volume is new. Run by the image's entry point as superuser, with psql.

-- Otherwise every role could connect to every database.
revoke connect on database postgres, template1 from public;

\getenv password WAYBILL_USER_PASSWORD
create role waybill_user login password :'password';
create database waybill_user owner waybill_user;
revoke connect on database waybill_user from public;

\getenv password WAYBILL_EMAIL_PASSWORD
create role waybill_email login password :'password';
create database waybill_email owner waybill_email;
revoke connect on database waybill_email from public;

\getenv password WAYBILL_ANALYTICS_PASSWORD
create role waybill_analytics login password :'password';
create database waybill_analytics owner waybill_analytics;
revoke connect on database waybill_analytics from public;
